package e2e

import (
	"cmp"
	"flag"
	"fmt"
	"html"
	"math"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

const (
	benchmarksFile    = "../../../docs/benchmarks.md"
	benchmarksPicture = "../../../docs/pictures/benchmarks.svg"
)

// A benchReport is what a benchmark has measured, in its order, for the documentation.
type benchReport struct {
	began   time.Time
	results []measured
	systemd string
	others  others
}

func (r *benchReport) add(b *testing.B, one measured) {
	if !b.Failed() {
		r.results = append(r.results, one)
	}
}

// rig notes what a rig was like.
func (r *benchReport) rig(b *testing.B, rig *systemdtest.Rig, o others) {
	r.others.all, r.others.foreign = r.others.all+o.all, r.others.foreign+o.foreign
	version := regexp.MustCompile(`\((.*)\)`).FindStringSubmatch(rig.Run(b, "systemctl", "--version"))
	if version == nil {
		b.Fatal("systemctl --version has no version in brackets")
	}
	r.systemd = version[1]
}

// others is CPU time of the machine over a while, and how much of it was used by
// what does not belong to the measurement.
type others struct{ all, foreign time.Duration }

// watchOthers returns a function that returns what there was since the call: the
// machine's CPU time less that of the rigs and of this process.
func watchOthers(b *testing.B, rigs ...*systemdtest.Rig) func() others {
	read := func() (all, foreign time.Duration) {
		text, err := os.ReadFile("/proc/stat")
		if err != nil {
			b.Fatal(err)
		}
		const tick = time.Second / 100 // USER_HZ
		line, _, _ := strings.Cut(string(text), "\n")
		for i, field := range strings.Fields(line)[1:9] {
			n, err := strconv.Atoi(field)
			if err != nil {
				b.Fatalf("/proc/stat: %v", err)
			}
			all += time.Duration(n) * tick
			if i != 3 && i != 4 { // idle and iowait
				foreign += time.Duration(n) * tick
			}
		}
		for _, rig := range rigs {
			inside, err := cgroupCPU(rig, ".")
			if err != nil {
				b.Fatal(err)
			}
			foreign -= inside
		}
		var self syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &self); err != nil {
			b.Fatal(err)
		}
		return all, foreign - time.Duration(self.Utime.Nano()+self.Stime.Nano())
	}
	all, foreign := read()
	return func() others {
		nowAll, nowForeign := read()
		return others{nowAll - all, nowForeign - foreign}
	}
}

// writeHost writes the results of BenchmarkHost with -update=baselines.
func (r *benchReport) writeHost(b *testing.B) {
	if *update != "baselines" || b.Failed() || len(r.results) == 0 {
		return
	}
	var t strings.Builder
	t.WriteString(r.head(b) + "\n\n![CPU time of a collection by number of units](pictures/benchmarks.svg)\n")
	for i, one := range r.results {
		if i == 0 || one.units != r.results[i-1].units || one.active != r.results[i-1].active {
			traffic := map[int]string{0: "none with traffic", 10: "one in ten with traffic", 100: "all with traffic"}[one.active]
			fmt.Fprintf(&t, "\n### %s units, %s\n\n", thousands(one.units), traffic)
			t.WriteString("| agent | CPU | of it the agent | compared | CPU for a unit | wall time | resident | units lost |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
		}
		wall := ms(one.wall)
		if one.agent.rounds {
			wall = ""
		}
		fmt.Fprintf(&t, "| %s | %s | %s | %s | %s µs | %s | %.0f MiB | %s |\n", one.agent.title(), ms(one.cpu), ms(one.own), r.compared(one),
			thousands(int(one.cpu.Microseconds())/one.units), wall, one.rss, one.losses())
	}
	t.WriteString("\n### What each agent reads\n\n| agent | of each unit |\n| --- | --- |\n")
	var named []string
	for _, one := range r.results {
		if !slices.Contains(named, one.agent.name) {
			named = append(named, one.agent.name)
			fmt.Fprintf(&t, "| %s, as `%s` | %s |\n", one.agent.title(), one.agent.user, one.agent.reads)
		}
	}
	r.write(b, "host", t.String())
	if err := os.WriteFile(benchmarksPicture, []byte(r.picture()), 0o644); err != nil {
		b.Fatal(err)
	}
}

// writeIdle writes the results of BenchmarkIdle with -update=baselines.
func (r *benchReport) writeIdle(b *testing.B) {
	if *update != "baselines" || b.Failed() || len(r.results) == 0 {
		return
	}
	var t strings.Builder
	t.WriteString(r.head(b) + "\n\n| agent | measured for | CPU | of one core | for a collection | compared | resident | units lost |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, one := range r.results {
		all := one.cpu * time.Duration(one.count)
		fmt.Fprintf(&t, "| %s | %s | %.2f s | %.3f %% | %s | %s | %.0f MiB | %s |\n", one.agent.title(), one.took.Round(time.Second), all.Seconds(),
			100*all.Seconds()/one.took.Seconds(), ms(one.cpu), r.compared(one), one.rss, one.losses())
	}
	r.write(b, "idle", t.String())
}

func (r *benchReport) write(b *testing.B, block, content string) {
	old, err := os.ReadFile(benchmarksFile)
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(benchmarksFile, []byte(replaceBlock(b, string(old), block, content)), 0o644); err != nil {
		b.Fatal(err)
	}
}

// compared says how many times the CPU time of one is in that of the agent it is
// compared with, on the same units.
func (r *benchReport) compared(one measured) string {
	for _, other := range r.results {
		if other.agent.name == one.agent.against && other.units == one.units && other.active == one.active {
			return fmt.Sprintf("1/%.1f", float64(other.cpu)/float64(one.cpu))
		}
	}
	return ""
}

// head says with which command, where and when the results were measured, and
// what else the machine did.
func (r *benchReport) head(b *testing.B) string {
	args := "-update=baselines"
	for _, name := range []string{"collections", "idle"} {
		if f := flag.Lookup(name); f.Value.String() != f.DefValue {
			args += " -" + name + "=" + f.Value.String()
		}
	}
	processor := "processor unknown"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if match := regexp.MustCompile(`(?m)^model name\s*: (.*)$`).FindSubmatch(text); match != nil {
			processor = string(match[1])
		}
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		b.Fatal(err)
	}
	share := 100 * max(0, float64(r.others.foreign)) / float64(max(1, r.others.all))
	noise := fmt.Sprintf("Other work on the machine took %.1f %% of its CPU time meanwhile", share)
	if share > 5 {
		noise += ": **it was not quiet, and these figures are preliminary**"
	}
	return fmt.Sprintf("%s, in %s, on %d cores (%s), Linux %s, systemd %s. %s.\n\n```console\n# make bench PKG=./cmd/unitmeter/e2e BENCH='%s' TESTFLAGS='%s'\n```",
		r.began.UTC().Format(time.DateOnly), time.Since(r.began).Round(time.Second), runtime.NumCPU(), processor,
		strings.TrimSpace(string(kernel)), r.systemd, noise, flag.Lookup("test.bench").Value, args)
}

// losses is how many units a collection lost on average.
func (m measured) losses() string {
	if m.lost == 0 || m.lost >= 10 {
		return fmt.Sprintf("%.0f", m.lost)
	}
	return fmt.Sprintf("%.1f", m.lost)
}

func ms(d time.Duration) string {
	v := float64(d.Microseconds()) / 1000
	switch {
	case v == math.Trunc(v):
		return thousands(int(v)) + " ms"
	case v < 10:
		return fmt.Sprintf("%.2f ms", v)
	case v < 100:
		return fmt.Sprintf("%.1f ms", v)
	}
	return thousands(int(math.Round(v))) + " ms"
}

func thousands(n int) string {
	if n < 1000 {
		return strconv.Itoa(n)
	}
	return fmt.Sprintf("%d,%03d", n/1000, n%1000)
}

// picture draws the CPU time of a collection over the number of units, one unit
// in ten active, with both axes logarithmic. It is SVG.
func (r *benchReport) picture() string {
	const width, height, left, right, top, bottom = 960, 560, 80, 350, 60, 50
	type line struct {
		name   string
		ours   bool
		points []measured
		label  float64 // y of its name
	}
	var lines []*line
	low, high, fewest, most := math.Inf(1), 0.0, math.Inf(1), 0.0
	for _, one := range r.results {
		if one.active != 10 {
			continue
		}
		i := slices.IndexFunc(lines, func(l *line) bool { return l.name == one.agent.title() })
		if i < 0 {
			i = len(lines)
			lines = append(lines, &line{name: one.agent.title(), ours: one.agent.ours()})
		}
		lines[i].points = append(lines[i].points, one)
		v := max(0.001, one.cpu.Seconds()*1000)
		low, high = min(low, v), max(high, v)
		fewest, most = min(fewest, float64(one.units)), max(most, float64(one.units))
	}
	low, high = math.Floor(math.Log10(low)), math.Ceil(math.Log10(high))
	x := func(units float64) float64 {
		return left + (width-left-right)*math.Log(units/fewest)/max(math.Log(most/fewest), 1)
	}
	y := func(millis float64) float64 {
		return height - bottom - (height-top-bottom)*(math.Log10(max(millis, 0.001))-low)/max(high-low, 1)
	}

	var s strings.Builder
	text := func(x, y float64, attributes, format string, args ...any) {
		fmt.Fprintf(&s, `<text x="%.1f" y="%.1f" %s>%s</text>`+"\n", x, y, attributes, html.EscapeString(fmt.Sprintf(format, args...)))
	}
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="system-ui, 'DejaVu Sans', sans-serif" font-size="13" fill="#222">`+"\n", width, height)
	s.WriteString("<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n")
	text(left, 26, `font-size="16" font-weight="bold"`, "CPU time of one collection, one unit in ten with traffic")
	text(left, 44, `fill="#666"`, "milliseconds of the agent, PID 1 and dbus-daemon together; both axes are logarithmic")
	for decade := low; decade <= high; decade++ {
		at := y(math.Pow(10, decade))
		fmt.Fprintf(&s, `<path d="M%d %.1fH%d" stroke="#ddd"/>`+"\n", left, at, width-right)
		text(left-8, at+4, `text-anchor="end" fill="#666"`, "%s", ms(time.Duration(math.Pow(10, decade)*float64(time.Millisecond))))
	}
	for i, one := range lines[0].points {
		if i > 0 && one.units == lines[0].points[i-1].units {
			continue
		}
		text(x(float64(one.units)), height-bottom+20, `text-anchor="middle" fill="#666"`, "%s units", thousands(one.units))
	}

	// A name stands at the end of its line, or as near as the others let it.
	last := func(l *line) time.Duration { return l.points[len(l.points)-1].cpu }
	slices.SortFunc(lines, func(a, b *line) int { return cmp.Compare(last(b), last(a)) })
	const spacing = 18
	for i, l := range lines {
		l.label = y(last(l).Seconds() * 1000)
		if i > 0 {
			l.label = max(l.label, lines[i-1].label+spacing)
		}
	}
	for i := len(lines) - 1; i >= 0; i-- {
		limit := float64(height - bottom)
		if i < len(lines)-1 {
			limit = lines[i+1].label - spacing
		}
		lines[i].label = min(lines[i].label, limit)
	}
	peers := []string{"#b4540a", "#8e3b8a", "#3f6fb5", "#7a6a00", "#a12b3f", "#5b5b5b"}
	for _, l := range lines {
		style := `stroke="#00796b" stroke-width="3"`
		color := "#00796b"
		if !l.ours {
			color, peers = peers[0], append(peers[1:], peers[0])
			style = `stroke="` + color + `" stroke-width="1.5"`
		}
		var path strings.Builder
		for i, one := range l.points {
			px, py := x(float64(one.units)), y(one.cpu.Seconds()*1000)
			fmt.Fprintf(&path, "%c%.1f %.1f", "ML"[min(i, 1)], px, py)
			fmt.Fprintf(&s, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`+"\n", px, py, color)
		}
		fmt.Fprintf(&s, `<path d="%s" fill="none" %s/>`+"\n", path.String(), style)
		end := l.points[len(l.points)-1]
		fmt.Fprintf(&s, `<path d="M%.1f %.1fL%d %.1f" stroke="%s" stroke-opacity=".5"/>`+"\n",
			x(float64(end.units))+4, y(end.cpu.Seconds()*1000), width-right+22, l.label, color)
		weight := ""
		if l.ours {
			weight = ` font-weight="bold"`
		}
		text(width-right+26, l.label+4, `fill="`+color+`"`+weight, "%s", l.name)
	}
	s.WriteString("</svg>\n")
	return s.String()
}
