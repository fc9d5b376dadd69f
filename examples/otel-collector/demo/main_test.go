package main

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestDemo is the demo as "make demo" runs it, with unitmeter as it is now.
func TestDemo(t *testing.T) {
	t.Chdir("../../..")
	unitmeter := filepath.Join(t.TempDir(), "unitmeter")
	build := exec.Command("go", "build", "-o", unitmeter, "./cmd/unitmeter")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build unitmeter: %v\n%s", err, out)
	}
	err := run(t.Context(), unitmeter)
	// Without root, or without the programs that "make tools" builds.
	impossible := errors.Is(err, errors.ErrUnsupported) || errors.Is(err, os.ErrNotExist)
	if impossible && os.Getenv("UNITMETER_TEST_NO_SKIP") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// received.jsonl is the first and the last request of a run of the demo.
func TestParseCollected(t *testing.T) {
	content, err := os.ReadFile("testdata/received.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	first, last, _ := strings.Cut(string(content), "\n")
	first += "\n"
	want := collected{
		counters: counters{15218709, 2180, 147772006, 4645},
		newest:   time.Unix(0, 1795441688432432475),
		points:   8, requests: 2,
	}
	tests := map[string]struct {
		in   string
		want collected
		err  string
	}{
		"two requests":          {in: first + last, want: want},
		"empty batch between":   {in: first + "{}\n" + last, want: want},
		"last line in progress": {in: first + last + first[:500], want: want},
		"nothing yet":           {in: ""},
		"other unit":            {in: strings.ReplaceAll(first, unit, "other.service")},
		"broken line":           {in: first[:500] + "\n", err: "read what the Collector received"},
		"counters fall":         {in: last + first, err: "fell from 147772006 to 0"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parseCollected(strings.NewReader(tt.in))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error is %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestParseCommands(t *testing.T) {
	want := counters{1, 2, 3, 4}
	tests := map[string]struct {
		parse func(string) (counters, error)
		out   string
		err   string
	}{
		"show":            {parseShow, "IPIngressBytes=1\nIPEgressPackets=4\nIPIngressPackets=2\nIPEgressBytes=3", ""},
		"show, no data":   {parseShow, "IPIngressBytes=[no data]\nIPIngressPackets=2\nIPEgressBytes=3\nIPEgressPackets=4", `IPIngressBytes of systemctl show: "[no data]"`},
		"show, missing":   {parseShow, "IPIngressBytes=1", `IPIngressPackets of systemctl show: ""`},
		"busctl":          {parseBusctl, "t 1\nt 2\nt 3\nt 4", ""},
		"busctl, no data": {parseBusctl, "t 1\nt 2\nt 3\nt 18446744073709551615", "IPEgressPackets"},
		"busctl, short":   {parseBusctl, "t 1", "1 lines, not 4"},
		"once":            {parseOnce, `[{"unit":"demo-nats.service","state":"on","ingress_bytes":1,"ingress_packets":2,"egress_bytes":3,"egress_packets":4}]`, ""},
		"once, off":       {parseOnce, `[{"unit":"demo-nats.service","state":"off","ingress_bytes":null,"ingress_packets":null,"egress_bytes":null,"egress_packets":null}]`, `is "off"`},
		"once, nothing":   {parseOnce, `[]`, "not the one unit"},
		"once, no JSON":   {parseOnce, `unitmeter`, "once --json"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := tt.parse(tt.out)
			switch {
			case tt.err == "" && (err != nil || got != want):
				t.Errorf("got %v, %v, want %v", got, err, want)
			case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
				t.Errorf("error is %v, want one with %q", err, tt.err)
			}
		})
	}
}

func TestPrintTellsDifferences(t *testing.T) {
	equal := readings{collector: collected{counters: counters{1, 2, 3, 4}}, systemctl: counters{1, 2, 3, 4}, busctl: counters{1, 2, 3, 4}, agent: counters{1, 2, 3, 4}}
	if !equal.print(io.Discard) {
		t.Error("equal readings are said to differ")
	}
	for i := range properties {
		for name, change := range map[string]func(r *readings){
			"collector": func(r *readings) { r.collector.counters[i]++ },
			"systemctl": func(r *readings) { r.systemctl[i]++ },
			"busctl":    func(r *readings) { r.busctl[i]++ },
			"once":      func(r *readings) { r.agent[i]++ },
		} {
			r := equal
			change(&r)
			var table strings.Builder
			if r.print(&table) || strings.Count(table.String(), "DIFFERENT") != 1 {
				t.Errorf("%s of %s differs, but the table is\n%s", properties[i], name, &table)
			}
		}
	}
}
