package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/protobuf/encoding/protojson"
)

// counters are a unit's four, in the order of properties.
type counters [4]uint64

// properties are systemd's names of the counters.
var properties = [4]string{"IPIngressBytes", "IPIngressPackets", "IPEgressBytes", "IPEgressPackets"}

// readings are the same counters, read in four ways.
type readings struct {
	collector                collected
	systemctl, busctl, agent counters
}

// readAll reads in all four ways, and prints the commands that do.
func (in inside) readAll(ctx context.Context) (r readings, err error) {
	fmt.Printf("  # %s, which the Collector's file exporter wrote\n", received)
	if r.collector, err = in.collector(); err != nil {
		return r, err
	}

	show := []string{"show", unit}
	for _, p := range properties {
		show = append(show, "-p", p)
	}
	out, err := in.run(ctx, "systemctl", show...)
	if err != nil {
		return r, err
	}
	if r.systemctl, err = parseShow(out); err != nil {
		return r, err
	}

	out, err = in.run(ctx, "busctl", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1",
		"org.freedesktop.systemd1.Manager", "GetUnit", "s", unit)
	if err != nil {
		return r, err
	}
	object := strings.Trim(strings.TrimPrefix(out, "o "), `"`)
	out, err = in.run(ctx, "busctl", append([]string{"get-property", "org.freedesktop.systemd1", object,
		"org.freedesktop.systemd1.Service"}, properties[:]...)...)
	if err != nil {
		return r, err
	}
	if r.busctl, err = parseBusctl(out); err != nil {
		return r, err
	}

	out, err = in.run(ctx, "unitmeter", "once", unit, "--json")
	if err != nil {
		return r, err
	}
	r.agent, err = parseOnce(out)
	return r, err
}

// print writes the table and reports whether all readings are the same.
func (r readings) print(w io.Writer) bool {
	tab := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tab, unit+"\tCollector received\tsystemctl show\tbusctl\tunitmeter once\t\t")
	same := true
	for i, p := range properties {
		verdict := "equal"
		if c := r.collector.counters[i]; c != r.systemctl[i] || c != r.busctl[i] || c != r.agent[i] {
			verdict, same = "DIFFERENT", false
		}
		fmt.Fprintf(tab, "%s\t%d\t%d\t%d\t%d\t%s\t\n", p, r.collector.counters[i], r.systemctl[i], r.busctl[i], r.agent[i], verdict)
	}
	tab.Flush()
	return same
}

// show reads the counters as systemctl prints them.
func (in inside) show(ctx context.Context) (counters, error) {
	out, err := in.quietly(ctx, "systemctl", "show", unit, "-p", strings.Join(properties[:], ","))
	if err != nil {
		return counters{}, err
	}
	return parseShow(out)
}

// parseShow reads the lines NAME=VALUE of systemctl show, in any order.
func parseShow(out string) (c counters, err error) {
	values := map[string]string{}
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		values[name] = value
	}
	for i, p := range properties {
		if c[i], err = parseCounter(values[p]); err != nil {
			return c, fmt.Errorf("read %s of systemctl show: %w", p, err)
		}
	}
	return c, nil
}

// parseBusctl reads the four lines "t VALUE" of busctl get-property.
func parseBusctl(out string) (c counters, err error) {
	lines := strings.Split(out, "\n")
	if len(lines) != len(c) {
		return c, fmt.Errorf("read busctl get-property: %d lines, not %d: %q", len(lines), len(c), out)
	}
	for i, line := range lines {
		if c[i], err = parseCounter(strings.TrimPrefix(line, "t ")); err != nil {
			return c, fmt.Errorf("read %s of busctl get-property: %w", properties[i], err)
		}
	}
	return c, nil
}

// parseCounter refuses systemd's ways to say "no data" as well.
func parseCounter(s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n == 1<<64-1 {
		return 0, fmt.Errorf("%q is not a counter; is IPAccounting on?", s)
	}
	return n, nil
}

// parseOnce reads the output of unitmeter once --json.
func parseOnce(out string) (counters, error) {
	var units []struct {
		Unit           string  `json:"unit"`
		State          string  `json:"state"`
		IngressBytes   *uint64 `json:"ingress_bytes"`
		IngressPackets *uint64 `json:"ingress_packets"`
		EgressBytes    *uint64 `json:"egress_bytes"`
		EgressPackets  *uint64 `json:"egress_packets"`
	}
	if err := json.Unmarshal([]byte(out), &units); err != nil {
		return counters{}, fmt.Errorf("read unitmeter once --json: %w", err)
	}
	if len(units) != 1 || units[0].Unit != unit {
		return counters{}, fmt.Errorf("read unitmeter once --json: not the one unit %s that was asked for: %s", unit, out)
	}
	u := units[0]
	var c counters
	for i, v := range []*uint64{u.IngressBytes, u.IngressPackets, u.EgressBytes, u.EgressPackets} {
		if v == nil {
			return counters{}, fmt.Errorf("read unitmeter once --json: no %s: accounting of %s is %q", properties[i], unit, u.State)
		}
		c[i] = *v
	}
	return c, nil
}

// collected is what the Collector received of the unit.
type collected struct {
	counters
	newest   time.Time // of the oldest of the four last points
	points   int
	requests int // those that had the unit
}

// collector reads what the Collector has written so far. A file that is not
// there yet is nothing received.
func (in inside) collector() (collected, error) {
	f, err := os.Open(in.Path(received))
	if errors.Is(err, os.ErrNotExist) {
		return collected{}, nil
	}
	if err != nil {
		return collected{}, fmt.Errorf("open what the Collector received: %w", err)
	}
	defer f.Close()
	return parseCollected(f)
}

// parseCollected reads the file exporter's lines of OTLP JSON. A last line
// without its end is still being written and is left out.
func parseCollected(r io.Reader) (c collected, err error) {
	var at [4]time.Time
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			return c, fmt.Errorf("read what the Collector received: %w", err)
		}
		var data metricspb.MetricsData
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(line, &data); err != nil {
			return c, fmt.Errorf("read what the Collector received: %w", err)
		}
		before := c.points
		for i, p := range points(&data) {
			now := time.Unix(0, int64(p.TimeUnixNano))
			value := uint64(p.GetAsInt())
			if value < c.counters[i] {
				return c, fmt.Errorf("read what the Collector received: %s fell from %d to %d; the series of a unit must never fall", properties[i], c.counters[i], value)
			}
			c.counters[i], at[i] = value, now
			c.points++
		}
		if c.points > before {
			c.requests++
		}
	}
	c.newest = at[0]
	for _, t := range at[1:] {
		if t.Before(c.newest) {
			c.newest = t
		}
	}
	return c, nil
}

// points yields the unit's points, each with its index in properties.
func points(data *metricspb.MetricsData) func(yield func(int, *metricspb.NumberDataPoint) bool) {
	index := map[[2]string]int{
		{"systemd.unit.network.io", "receive"}:            0,
		{"systemd.unit.network.packet.count", "receive"}:  1,
		{"systemd.unit.network.io", "transmit"}:           2,
		{"systemd.unit.network.packet.count", "transmit"}: 3,
	}
	return func(yield func(int, *metricspb.NumberDataPoint) bool) {
		for _, rm := range data.ResourceMetrics {
			for _, sm := range rm.ScopeMetrics {
				for _, m := range sm.Metrics {
					for _, p := range m.GetSum().GetDataPoints() {
						attributes := map[string]string{}
						for _, kv := range p.Attributes {
							attributes[kv.Key] = kv.Value.GetStringValue()
						}
						i, ok := index[[2]string{m.Name, attributes["network.io.direction"]}]
						if ok && attributes["systemd.unit.name"] == unit && !yield(i, p) {
							return
						}
					}
				}
			}
		}
	}
}
