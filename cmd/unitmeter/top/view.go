package top

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver"
)

// Styles. Bubble Tea takes the colours out for NO_COLOR and for terminals
// without.
const (
	styleTitle    = "\x1b[1m"
	styleSelected = "\x1b[7m"
	styleFaint    = "\x1b[2m"
	styleGraph    = "\x1b[36m"
	styleNotice   = "\x1b[33m"
	styleEnd      = "\x1b[m"
)

// A shownColumn is a column of a list with its place on the screen.
type shownColumn struct {
	column
	title string
	width int
}

// nameWidth is the least that a name gets.
const nameWidth = 24

// columns are those that there is room for, from left to right.
func (m *topModel) columns() []shownColumn {
	number := 11
	if m.exact {
		number = 15
	}
	name := shownColumn{byName, "UNIT", 0}
	if m.list == sliceScreen {
		name.title = "SLICE"
	}
	all := []shownColumn{name, {byIn, "IN/s", number}, {byOut, "OUT/s", number},
		{byPacketsIn, "IN pkt/s", 10}, {byPacketsOut, "OUT pkt/s", 10}, {byTotal, "TOTAL", number}, {byRecent, "LAST MINUTE", 16}}
	// What is always there: the name, and the two speeds with a space before each.
	used := 2*number + 2
	// The graph is worth more than the total, and that more than the packets.
	for _, optional := range [][]column{{byRecent}, {byTotal}, {byPacketsIn, byPacketsOut}} {
		isOptional := func(c shownColumn) bool { return slices.Contains(optional, c.column) }
		width := 0
		for _, c := range all {
			if isOptional(c) {
				width += c.width + 1
			}
		}
		if used+width+nameWidth > m.width {
			all = slices.DeleteFunc(all, isOptional)
		} else {
			used += width
		}
	}
	all[0].width = max(1, m.width-used)
	if most := 60; all[0].width > most {
		all[len(all)-1].width += min(all[0].width-most, 44) // a longer graph, rather than a gap
		all[0].width = most
	}
	return all
}

// listHeight is how many rows there is room for: without the title, the totals,
// the header and the keys.
func (m *topModel) listHeight() int { return max(1, m.height-4) }

// lines makes the screen, as many lines as it is high.
func (m *topModel) lines() []string {
	var lines []string
	switch m.screen {
	case detailScreen:
		lines = m.detail()
	case helpScreen:
		lines = m.help()
	default:
		lines = m.table()
	}
	// Always as many lines as the terminal has: a shorter screen would leave old
	// lines below.
	for len(lines) < m.height-1 {
		lines = append(lines, "")
	}
	lines = append(lines[:max(0, min(len(lines), m.height-1))], m.footer())
	return lines
}

// title is the first line.
func (m *topModel) title(text string) string {
	clock := ""
	// The time of the numbers, not of the drawing: a systemd that has stopped
	// answering shows in a clock that stands.
	if !m.board.last.IsZero() {
		clock = m.board.last.Local().Format("15:04:05")
	}
	if m.paused {
		clock = "paused at " + clock
	}
	return styleTitle + tty.Fit(tty.Fit(text, m.width-len(clock)-1, false)+" "+clock, m.width, false) + styleEnd
}

// table is a list of units or slices.
func (m *topModel) table() []string {
	sums := m.board.sums()
	lines := []string{
		m.title(fmt.Sprintf("unitmeter top   in %s   out %s", m.rate(sums, bytesIn), m.rate(sums, bytesOut))),
		m.status(),
	}
	shown := m.columns()
	var header strings.Builder
	for _, c := range shown {
		title := c.title
		// Numbers begin with the largest, which is down; names with a, which is
		// up.
		if c.column == m.sort {
			title += map[bool]string{false: "▼", true: "▲"}[m.back != (c.column == byName)]
		}
		header.WriteString(tty.Fit(title, c.width, c.column != byName && c.column != byRecent) + " ")
	}
	lines = append(lines, styleTitle+tty.Fit(strings.TrimSuffix(header.String(), " "), m.width, false)+styleEnd)
	height := m.listHeight()
	for i := m.top; i < len(m.rows) && i < m.top+height; i++ {
		lines = append(lines, m.line(m.rows[i], shown, i == m.position()))
	}
	if len(m.rows) == 0 {
		lines = append(lines, "", m.emptiness())
	}
	return lines
}

// status is the second line: what is filtered, and what has no numbers.
func (m *topModel) status() string {
	switch {
	case m.typing:
		return tty.Fit("filter: "+m.filter+"_", m.width, false)
	case m.notice != "":
		return styleNotice + tty.Fit(m.notice, m.width, false) + styleEnd
	}
	parts := []string{fmt.Sprintf("%d units %s", len(m.board.rows), m.origin)}
	if m.filter != "" {
		parts[0] = fmt.Sprintf("%d of %d with %q (esc: all)", len(m.rows), len(m.board.rows), m.filter)
	}
	if hint := m.origin.Hint(); hint != "" {
		parts = append(parts, hint)
	}
	// What is missing is said with the command that fixes it, or it would be
	// taken for silence.
	if n := m.board.others["off"]; n > 0 {
		parts = append(parts, fmt.Sprintf("%d with accounting off (%s)", n, accounting.EnableAll))
	}
	if n := m.board.others["lost"]; n > 0 {
		parts = append(parts, fmt.Sprintf("%d lost (unitmeter enable --lost)", n))
	}
	return tty.Fit(joinFitting(parts, "; ", m.width), m.width, false)
}

// joinFitting joins the parts that fit: half of a command is of no use.
func joinFitting(parts []string, separator string, width int) string {
	text := parts[0]
	for _, part := range parts[1:] {
		if longer := text + separator + part; utf8.RuneCountInString(longer) <= width {
			text = longer
		}
	}
	return text
}

// emptiness says why there are no rows.
func (m *topModel) emptiness() string {
	switch {
	case m.board.last.IsZero():
		return ""
	case m.filter != "":
		return tty.Fit("no unit has "+m.filter+" in its name; esc shows all", m.width, false)
	case m.board.wanted.Len() > 0:
		return tty.Fit("no metered unit matches "+strings.Join(m.board.wanted.Texts(), " ")+" yet", m.width, false)
	}
	if m.origin.Source == receiver.EBPF {
		return tty.Fit("there is no unit that the settings leave in", m.width, false)
	}
	return tty.Fit("no unit has IP accounting on: "+accounting.EnableAll, m.width, false)
}

// line is one row of a list.
func (m *topModel) line(r *topRow, shown []shownColumn, selected bool) string {
	var b strings.Builder
	graph := ""
	for _, c := range shown {
		switch c.column {
		case byName:
			name := r.name
			if !r.ended.IsZero() {
				name += " (ended)"
			}
			b.WriteString(tty.Fit(name, c.width, false))
		case byIn:
			b.WriteString(tty.Fit(m.rate(r.now, bytesIn), c.width, true))
		case byOut:
			b.WriteString(tty.Fit(m.rate(r.now, bytesOut), c.width, true))
		case byPacketsIn:
			b.WriteString(tty.Fit(m.packets(r.now, packetsIn), c.width, true))
		case byPacketsOut:
			b.WriteString(tty.Fit(m.packets(r.now, packetsOut), c.width, true))
		case byTotal:
			b.WriteString(tty.Fit(m.volume(r.total.bytes()), c.width, true))
		case byRecent:
			graph = sparkline(r.history, m.board.intervals(recent), c.width)
			continue // the last, with a style of its own
		}
		b.WriteByte(' ')
	}
	text := tty.Fit(strings.TrimSuffix(b.String(), " "), m.width-utf8.RuneCountInString(graph), false)
	switch {
	// A row that is selected has one style from end to end: an end of the
	// graph's style within would end the selection too.
	case selected:
		return styleSelected + text + graph + styleEnd
	case !r.ended.IsZero() || r.now.bytes() == 0 && r.mean(m.board.intervals(recent)).bytes() == 0:
		return styleFaint + text + graph + styleEnd
	}
	return text + styleGraph + graph + styleEnd
}

// detail is the screen of one unit or slice.
func (m *topModel) detail() []string {
	r := m.selected()
	// The cursor keeps the name of what has gone, so that it comes back here when
	// the unit does.
	if r == nil {
		return []string{m.title(m.cursor), "", tty.Fit("the unit is gone; esc goes back", m.width, false)}
	}
	lines := []string{m.title(r.name), ""}
	field := func(name, value string) {
		lines = append(lines, tty.Fit(fmt.Sprintf("%-11s%s", name, value), m.width, false))
	}
	// A slice has no run and no start of its own on the board.
	if r.units > 0 || m.list == sliceScreen {
		field("units", strconv.Itoa(r.units))
	} else {
		field("slice", r.unit.Slice)
		if r.unit.Invocation != "" {
			field("run", r.unit.Invocation)
		}
		if accounting.Counted(r.unit) {
			since := m.board.last.Sub(r.unit.Start).Round(time.Second)
			field("counts", "since "+r.unit.Start.Local().Format("2006-01-02 15:04:05")+" ("+since.String()+")")
		}
	}
	if !r.ended.IsZero() {
		field("ended", r.ended.Local().Format("15:04:05"))
	}
	// Over all that is kept, while the total is over the run: what systemd
	// counted before top began has no speed.
	mean := r.mean(len(r.history))
	const columns = "%-12s%15s%15s%15s%15s"
	lines = append(lines, "", styleTitle+tty.Fit(fmt.Sprintf(columns, "", "now", "mean", "peak", "total"), m.width, false)+styleEnd)
	mean.known, r.peak.known = len(r.history) > 0, len(r.history) > 0
	for _, k := range []struct {
		title string
		kind  int
		write func(s speeds, kind int) string
		total string
	}{
		{"received", bytesIn, m.rate, m.volume(r.total[bytesIn])},
		{"sent", bytesOut, m.rate, m.volume(r.total[bytesOut])},
		{"packets in", packetsIn, m.packetRate, tty.Grouped(r.total[packetsIn])},
		{"packets out", packetsOut, m.packetRate, tty.Grouped(r.total[packetsOut])},
	} {
		lines = append(lines, tty.Fit(fmt.Sprintf(columns, k.title, k.write(r.now, k.kind), k.write(mean, k.kind), k.write(r.peak, k.kind), k.total), m.width, false))
	}
	field("since "+m.board.began.Local().Format("15:04:05"), fmt.Sprintf("   received %s, sent %s", m.volume(r.session[bytesIn]), m.volume(r.session[bytesOut])))

	// What is left of the screen is for the two graphs.
	return append(lines, m.graphs(r, m.height-1-len(lines))...)
}

// graphs draws the speeds of a unit or slice over time, in room lines.
func (m *topModel) graphs(r *topRow, room int) (lines []string) {
	high := min(max((room-4)/2, 1), 6)
	// At first a minute, then as much as there is: ten minutes of which nine are
	// empty would show nothing.
	n := min(m.board.intervals(keepHistory), max(m.board.intervals(recent), len(r.history)))
	span := (time.Duration(n) * m.board.interval).Round(time.Second)
	for _, g := range []struct {
		title string
		kind  int
	}{{"received", bytesIn}, {"sent", bytesOut}} {
		buckets := resample(r.history, func(s speeds) float64 { return s.of[g.kind] }, n, m.width)
		most := highest(buckets)
		lines = append(lines, "", tty.Fit(fmt.Sprintf("%s, the last %s, up to %s", g.title, span, rateText(most, true, m.exact)), m.width, false))
		for _, l := range chart(buckets, most, high) {
			lines = append(lines, styleGraph+l+styleEnd)
		}
	}
	return lines
}

// help is the screen of the keys.
func (m *topModel) help() []string {
	lines := []string{m.title("unitmeter top: keys"), ""}
	for _, l := range []string{
		"up down j k        move; also pgup, pgdn, home, end",
		"enter              one unit or slice: speeds, peaks, totals, history",
		"left right         sort by the next column; n i o t m: by name, in, out,",
		"                   total, last minute; once more, or r: the other way round",
		"/                  filter by a part of the name; esc: all again",
		"s tab              totals by slice, and back",
		"b                  exact bytes, and back",
		"space p            stop the screen, and go on",
		"esc q              back; q in a list, or ctrl+c: end",
		"",
		"IN and OUT are IP bytes with headers. Traffic between two units of this",
		"host is on both of them. TOTAL is what systemd has counted in the present",
		"run of the unit. - stands for an interval without a known speed.",
	} {
		lines = append(lines, tty.Fit(l, m.width, false))
	}
	return lines
}

// footer names the keys that do something on this screen.
func (m *topModel) footer() string {
	keys := []string{"q end", "? help", "enter one unit", "/ filter", "< > sort", "r reverse", "s slices", "b bytes"}
	switch {
	case m.typing:
		keys = []string{"enter keep", "esc all"}
	case m.screen == detailScreen, m.screen == helpScreen:
		keys = []string{"esc back", "b bytes", "space stop"}
	}
	return styleFaint + tty.Fit(joinFitting(keys, "  ", m.width), m.width, false) + styleEnd
}

// rate writes a speed of bytes.
func (m *topModel) rate(s speeds, kind int) string { return rateText(s.of[kind], s.known, m.exact) }

// rateText writes a speed in bytes per second. What is not known is a dash: a
// zero would be a number.
func rateText(v float64, known, exact bool) string {
	switch {
	case !known:
		return "-"
	case exact:
		return tty.Grouped(uint64(math.Round(v))) + " B/s"
	}
	return tty.Bytes(v) + "/s"
}

// packets writes packets per second, without a unit: the column has it.
func (m *topModel) packets(s speeds, kind int) string {
	if !s.known {
		return "-"
	}
	return tty.Grouped(uint64(math.Round(s.of[kind])))
}

// packetRate writes packets per second with their unit.
func (m *topModel) packetRate(s speeds, kind int) string { return m.packets(s, kind) + "/s" }

// volume writes a number of bytes as the screen's mode has it.
func (m *topModel) volume(n uint64) string { return volumeText(n, m.exact) }

// volumeText writes a number of bytes.
func volumeText(n uint64, exact bool) string {
	if exact {
		return tty.Grouped(n) + " B"
	}
	return tty.Bytes(float64(n))
}

// resample makes so many values of the last n speeds, the newest last. Each is
// the largest of its part: a peak must not vanish in a mean. NaN is a gap.
func resample(history []speeds, value func(speeds) float64, n, width int) []float64 {
	out := make([]float64, width)
	for i := range out {
		out[i] = math.NaN()
		// Positions count back from the newest.
		from, to := len(history)-n+i*n/width, len(history)-n+max((i+1)*n/width, i*n/width+1)
		for _, s := range history[min(max(from, 0), len(history)):min(max(to, 0), len(history))] {
			// The negation takes the first value too, since NaN compares with nothing.
			if s.known && !(value(s) < out[i]) {
				out[i] = value(s)
			}
		}
	}
	return out
}

// sparkline draws the last n speeds, of both directions, in one line. Its scale is
// that of the unit alone.
func sparkline(history []speeds, n, width int) string {
	buckets := resample(history, speeds.bytes, n, width)
	return chart(buckets, highest(buckets), 1)[0]
}

// highest is the largest value; gaps do not count.
func highest(values []float64) float64 {
	most := 0.0
	for _, v := range values {
		if v > most { // max would answer NaN
			most = v
		}
	}
	return most
}

// chart draws values as columns, so many lines high. Anything above 0 is seen.
func chart(values []float64, most float64, high int) []string {
	eighths := []rune(" ▁▂▃▄▅▆▇█")
	lines := make([]string, high)
	for l := range lines {
		var b strings.Builder
		// Each line is eight levels high; the first line is the top one.
		base := (high - 1 - l) * 8
		for _, v := range values {
			level := 0
			if v > 0 && most > 0 {
				level = max(1, int(math.Round(v/most*float64(high*8))))
			}
			b.WriteRune(eighths[min(max(level-base, 0), 8)])
		}
		lines[l] = b.String()
	}
	return lines
}

// printTop prints the table of --once, the busiest unit first.
func printTop(w io.Writer, b *board, origin accounting.Origin, exact bool) error {
	tab := tty.NewTable(w, true, "IN/s", "OUT/s", "IN pkt/s", "OUT pkt/s", "TOTAL IN", "TOTAL OUT", "UNIT")
	tab.Drop([]string{"IN pkt/s", "OUT pkt/s"}, []string{"TOTAL IN", "TOTAL OUT"})
	for _, r := range b.sorted(b.all(), byRecent, false) {
		packets := func(kind int) string {
			if !r.now.known {
				return "-"
			}
			return strconv.FormatFloat(r.now.of[kind], 'f', 0, 64)
		}
		tab.Row(rateText(r.now.of[bytesIn], r.now.known, exact), rateText(r.now.of[bytesOut], r.now.known, exact), packets(packetsIn), packets(packetsOut),
			volumeText(r.total[bytesIn], exact), volumeText(r.total[bytesOut], exact), r.name)
	}
	if err := tab.Flush(); err != nil {
		return err
	}
	return accounting.WriteHints(w, origin, b.others["off"], b.others["lost"], accounting.EnableAll)
}
