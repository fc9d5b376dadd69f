package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

const conformanceDoc = "../../../docs/conformance.md"

// long says that the variants that take an hour are wanted.
func long() bool { return os.Getenv("UNITMETER_CONFORMANCE_LONG") != "" }

// times returns how often to do a thing: normally, and in the long run.
func times(normal, longRun int) int {
	if long() {
		return longRun
	}
	return normal
}

// TestConformance runs the agent (UNITMETER_BINARY, or one built from this tree)
// beside a real systemd, sends traffic of known size through units of all kinds, and
// compares with what an OTLP receiver got: once with the source dbus, once with ebpf
// and without IP accounting. It prints a verdict for each scenario; with
// -update=conformance it writes docs/conformance.md too.
func TestConformance(t *testing.T) {
	suites := map[string][]group{receiver.DBus: conformance(), receiver.EBPF: conformanceEBPF()}
	reports := map[string]*report{}
	for _, source := range []string{receiver.DBus, receiver.EBPF} {
		report := &report{source: source, rows: map[string]row{}, groups: suites[source]}
		reports[source] = report
		t.Run(source, func(t *testing.T) {
			for _, g := range report.groups {
				t.Run(g.name, func(t *testing.T) {
					t.Parallel()
					g.run(t, report)
				})
			}
		})
		if len(report.rows) > 0 { // else -run has left it out
			t.Logf("verdicts for %s, source %s, systemd %s\n%s", report.binary(), source, report.version, report.table())
		}
	}
	if *update == "conformance" && !t.Failed() {
		if err := os.WriteFile(conformanceDoc, []byte(document(reports[receiver.DBus], reports[receiver.EBPF])), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// group is a rig with an agent, and what is tried on it, one after the other.
type group struct {
	name  string
	agent agent
	// room is the number of cgroups for which the eBPF meter has room; 0 is the default.
	room      uint32
	scenarios []scenario
}

// scenario is one row of the table.
type scenario struct {
	// id is the name of the scenario's slice, without ".slice", and what the
	// names of all its units begin with.
	id, title string
	// units are unit files. {slice} and {send} are replaced, see expand.
	units map[string]string
	// witness has systemd count the slice itself with the source ebpf too, since the
	// scenario does not know what it sends.
	witness bool
	run     func(*scene)
	plain   bool // no unit has IP accounting
}

// expand fills in a text of the scenario: its slice, and the command that sends
// so many datagrams of 128 B, IP header included.
func (s *scenario) expand(text string) string {
	if s.plain {
		text = strings.ReplaceAll(text, "IPAccounting=yes", "IPAccounting=no")
	}
	return strings.NewReplacer("{id}", s.id, "{slice}", s.id+".slice", "{send}", sendCommand, "{traffic}", "/usr/local/bin/traffic", "{kinds}", "/usr/local/bin/kinds").Replace(text)
}

// run boots the rig and runs the scenarios.
func (g group) run(t *testing.T, report *report) {
	l := newLab(t, nil, report.source)
	if l.source == receiver.EBPF {
		l.loadMeter(g.room)
		l.Kinds(t)
	}
	version, _ := l.systemd()
	report.setVersion(version)
	g.scenarios = slices.Clone(g.scenarios)
	for i := range g.scenarios {
		s := &g.scenarios[i]
		s.plain = l.source == receiver.EBPF
		if !s.plain || s.witness {
			l.WriteFile(t, "/etc/systemd/system/"+s.id+".slice", "[Slice]\nIPAccounting=yes\n")
		}
		for name, text := range s.units {
			l.WriteFile(t, "/etc/systemd/system/"+name, s.expand(text))
		}
	}
	l.Run(t, "systemctl", "daemon-reload")
	for _, s := range g.scenarios {
		l.Run(t, "systemctl", "start", s.id+".slice")
	}
	l.startAgent(g.agent)
	var scenes []*scene
	for _, s := range g.scenarios {
		t.Run(s.id, func(t *testing.T) {
			scene := &scene{lab: l, scenario: s, t: t, report: report}
			scenes = append(scenes, scene)
			defer scene.finish()
			l.t = t // the lab's helpers fail the scenario that they help
			scene.scenario.run(scene)
		})
		l.t = t
	}
	// What is counted twice may come late: the journal is read behind the bus.
	time.Sleep(1500 * time.Millisecond)
	for _, s := range scenes {
		if s.again != nil && !s.t.Failed() && !s.t.Skipped() {
			if now := s.again(); now != s.row.received {
				t.Errorf("%s: received %s, and later %s", s.id, show(s.row.received), show(now))
			}
		}
	}
	if rest := l.unattributed("-.slice"); l.source == receiver.EBPF && g.room == 0 && rest != (systemd.Counters{}) {
		t.Errorf("%s found no room or no name", show(rest))
	}
	for i, problem := range l.wrong() {
		if i < 10 {
			t.Errorf("a point that breaks the rules: %s", problem)
		}
	}
}

// scene is a scenario on its rig.
type scene struct {
	*lab
	scenario
	t      *testing.T
	report *report
	row    row
	again  func() systemd.Counters // what has been received, once more
}

// row is one row of the table.
type row struct {
	sent                string // as the scenario knows it
	accounted, received systemd.Counters
	unattributed        systemd.Counters // bytes only
	counted             bool             // accounted and received mean something
	verdict, note       string
}

// finish files the row, whichever way the scenario ended.
func (s *scene) finish() {
	switch {
	case s.t.Failed():
		s.row.verdict = "**FAILED**"
	case s.t.Skipped():
		s.row.verdict = "not run"
	case s.row.verdict == "":
		s.t.Error("the scenario has no verdict")
		s.row.verdict = "**FAILED**"
	}
	s.report.add(s.id, s.row)
}

// skip ends the scenario with the reason why it cannot be run here.
func (s *scene) skip(reason string) {
	s.t.Helper()
	s.row.note = reason
	s.t.Skip(reason)
}

// mine reports whether a unit belongs to the scenario.
func (s *scene) mine(unit string) bool {
	rest, ok := strings.CutPrefix(unit, s.id)
	return ok && rest != "" && (strings.ContainsRune(".@-*", rune(rest[0])))
}

func (s *scene) receivedNow() systemd.Counters { return s.sum(s.mine) }

func (s *scene) slice() string { return s.id + ".slice" }

// sliceCounted is what systemd accounted to the scenario's slice: all of its
// units, those that are gone included.
func (s *scene) sliceCounted() systemd.Counters {
	s.t.Helper()
	c, ok := s.counted(s.slice())
	if !ok {
		s.t.Fatalf("systemd has no counters of %s", s.slice())
	}
	return c
}

// sent gives the size of what the scenario sent, as the scenario itself knows it.
func (s *scene) sent(format string, args ...any) { s.row.sent = fmt.Sprintf(format, args...) }

// datagrams says that the scenario sent n datagrams of 128 B, and that systemd
// must have accounted exactly these.
func (s *scene) datagrams(n int) systemd.Counters {
	s.sent("%d × 128 B", n)
	return systemd.Counters{EgressBytes: uint64(n) * packetBytes, EgressPackets: uint64(n)}
}

// exact wants all that systemd accounted to the slice to arrive in the series of
// its units, and nothing to be unattributed. known, if it is not zero, is what
// systemd must have accounted.
func (s *scene) exact(known systemd.Counters) {
	s.t.Helper()
	s.equal(s.truth(known), s.receivedNow)
	if u := s.lab.unattributed(s.slice()); u != (systemd.Counters{}) {
		s.t.Errorf("unattributed are %s", show(u))
	}
}

// truth is what systemd has accounted to the slice. Where it does not count, it is
// what is known to have been sent.
func (s *scene) truth(known systemd.Counters) systemd.Counters {
	s.t.Helper()
	if s.source == receiver.EBPF && !s.witness {
		return known
	}
	if s.source == receiver.EBPF { // the last packets of a connection pass when its sender has ended
		s.arrives(time.Minute, func() bool { return s.sliceCounted() == s.receivedNow() })
	}
	accounted := s.sliceCounted()
	if known != (systemd.Counters{}) && accounted != known {
		s.t.Errorf("systemd accounted %s, sent were %s", show(accounted), show(known))
	}
	return accounted
}

// equal wants what arrives to become what systemd accounted.
func (s *scene) equal(accounted systemd.Counters, received func() systemd.Counters) {
	s.t.Helper()
	s.arrives(time.Minute, func() bool { return received() == accounted })
	s.row.accounted, s.row.received, s.row.counted = accounted, received(), true
	s.row.unattributed = s.lab.unattributed(s.slice())
	s.again = received
	if s.row.received != accounted {
		s.t.Errorf("%s were accounted, received were %s; unattributed %s", show(accounted), show(s.row.received), show(s.row.unattributed))
	}
	if accounted == (systemd.Counters{}) {
		s.t.Error("nothing was accounted: this shows nothing")
	}
	s.row.verdict = "exact"
}

// note adds a remark to the row.
func (s *scene) note(format string, args ...any) {
	if s.row.note != "" {
		s.row.note += "; "
	}
	s.row.note += fmt.Sprintf(format, args...)
}

// in runs a script of the scenario.
func (s *scene) in(script string, args ...string) string {
	s.t.Helper()
	return s.shell(s.t, s.expand(script), args...)
}

// report collects the rows of one suite.
type report struct {
	source  string
	groups  []group
	mu      sync.Mutex
	rows    map[string]row
	version string
}

func (r *report) add(id string, row row) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rows[id] = row
}

func (r *report) setVersion(version string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.version = version
}

func (r *report) binary() string {
	if given := os.Getenv("UNITMETER_BINARY"); given != "" {
		return given
	}
	return "the agent of this tree"
}

// table is the table in Markdown, in the order of the groups.
func (r *report) table() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	truth := "Accounted by systemd"
	if r.source == receiver.EBPF {
		truth = "Truth"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "| Scenario, `%s` | Sent | %s | Received | Difference | Verdict |\n|---|---|---|---|---|---|\n", r.source, truth)
	for _, g := range r.groups {
		for _, s := range g.scenarios {
			row, ok := r.rows[s.id]
			if !ok {
				continue // -run has left it out
			}
			verdict := row.verdict
			if row.note != "" {
				verdict += ": " + row.note
			}
			accounted, received, difference := "", "", ""
			if row.counted {
				accounted, received, difference = show(row.accounted), show(row.received), showDifference(row.accounted, row.received)
				if s.witness && r.source == receiver.EBPF {
					accounted += " by systemd"
				}
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", s.title, row.sent, accounted, received, difference, verdict)
		}
	}
	return b.String()
}

// document is docs/conformance.md.
func document(dbus, ebpf *report) string {
	return `<!-- Written by "go test ./cmd/unitmeter/e2e -run TestConformance -update=conformance"; do not edit. -->
# Conformance

Each scenario runs the agent beside a real systemd, sends traffic of known size
through units, and compares it with what an OTLP/gRPC receiver got, for all four
counters. To test another agent:

` + "```" + `
UNITMETER_BINARY=/path/to/unitmeter make conformance
` + "```" + `

` + "`UNITMETER_CONFORMANCE_LONG=1`" + ` runs the long variants, ` + "`UNITMETER_TEST_ROOT=DIR`" + ` boots
the systemd of another root tree. Needs root on Linux with cgroup v2.

- "exact" means that the difference is 0 and stayed 0. Also, no point of any series
  broke the rules: no total fell, no start moved, and no delta was negative or
  overlapped with another. If the slice was compared, its ` + "`unitmeter.unattributed`" + ` was 0,
  unless the row says otherwise; not checked over reloads and the reboot, in the
  overflow, and in the default fold.
- "stated" means that the difference is not 0, and that ` + "`unitmeter.unattributed`" + `
  has exactly the difference.

Last run: ` + time.Now().UTC().Format(time.DateOnly) + `, systemd ` + dbus.version + `, ` + mode() + `.

## Source dbus

"Accounted" is the counter of the scenario's own slice by ` + "`systemctl show`" + `. The slice
includes all units of the scenario, also those that are gone. Where systemd loses
traffic (reload, re-execution), it is the counter of the unit. Where the slice left
out short runs, it is the sum of systemd's records of them.

` + dbus.table() + `
## Source ebpf

No unit has IP accounting. "Truth" is what the scenario sent. Where it cannot know
that (headers and acknowledgements of TCP), systemd counts the scenario's slice, and
that alone: "by systemd". Nothing in the whole rig was without a room or a name,
unless the row says otherwise.

` + ebpf.table()
}

func mode() string {
	if long() {
		return "with UNITMETER_CONFORMANCE_LONG=1"
	}
	return "without the long variants"
}

// show prints counters for the table.
func show(c systemd.Counters) string {
	var parts []string
	add := func(name string, bytes, packets uint64) {
		if bytes+packets > 0 {
			parts = append(parts, fmt.Sprintf("%s %d B / %d p", name, bytes, packets))
		}
	}
	add("out", c.EgressBytes, c.EgressPackets)
	add("in", c.IngressBytes, c.IngressPackets)
	if len(parts) == 0 {
		return "0"
	}
	return strings.Join(parts, ", ")
}

// showDifference prints a - b.
func showDifference(a, b systemd.Counters) string {
	if a == b {
		return "0"
	}
	diff := []string{
		fmt.Sprintf("out %+d B", int64(b.EgressBytes-a.EgressBytes)), fmt.Sprintf("%+d p", int64(b.EgressPackets-a.EgressPackets)),
		fmt.Sprintf("in %+d B", int64(b.IngressBytes-a.IngressBytes)), fmt.Sprintf("%+d p", int64(b.IngressPackets-a.IngressPackets)),
	}
	return strings.Join(diff, ", ")
}
