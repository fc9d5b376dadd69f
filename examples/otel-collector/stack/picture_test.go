package stack_test

import (
	"cmp"
	"encoding/json"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// drawn is one panel as testdata/board.html takes it.
type drawn struct {
	Title   string   `json:"title"`
	Type    string   `json:"type"`
	Unit    string   `json:"unit"`
	Width   int      `json:"width"`
	Stacked bool     `json:"stacked"`
	Series  []line   `json:"series"`
	Columns []column `json:"columns"`
}

type line struct {
	Name   string       `json:"name"`
	Points [][2]float64 `json:"points"`
}

type column struct {
	Name   string `json:"name"`
	Unit   string `json:"unit"`
	Series []line `json:"series"`
}

// draw records for the time of the flag -pictures, then makes the pictures of
// the documentation: what Prometheus answers to the queries of the panels.
func draw(t *testing.T, rig *systemdtest.Rig, b backend, d dashboard) {
	t.Helper()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v; install it with: apt-get install chromium", err)
	}
	begin := time.Now()
	for time.Since(begin) < *pictures {
		rig.Run(t, "systemd-run", "--quiet", "--wait", "--collect", "--unit=backup", "-p", "IPAccounting=yes",
			rig.Traffic(), "udp-send", "127.0.0.1:7001", "-bytes", "1400", "-count", "2500", "-rate", "500")
		time.Sleep(7 * time.Second)
	}
	end := time.Now()
	page := read(t, "testdata/board.html")
	values := d.variables(t, b)
	values["__range"] = strconv.Itoa(int(end.Sub(begin).Seconds())) + "s"
	for name, rows := range map[string][2]int{"dashboard": {0, 35}, "dashboard-agent": {35, 100}} {
		var panels []drawn
		for _, p := range d.Panels {
			if p.Type == "row" || p.GridPos.Y < rows[0] || p.GridPos.Y >= rows[1] {
				continue
			}
			panel := drawn{Title: p.Title, Type: p.Type, Unit: p.FieldConfig.Defaults.Unit, Width: p.GridPos.W,
				Stacked: p.FieldConfig.Defaults.Custom.Stacking.Mode == "normal"}
			for i, target := range p.Targets {
				series := b.lines(t, fill(target.Expr, values), target.LegendFormat, begin, end)
				if p.Type == "table" {
					panel.Columns = append(panel.Columns, column{
						Name:   []string{"received", "sent", "packets received", "packets sent"}[i],
						Unit:   []string{"bytes", "bytes", "short", "short"}[i],
						Series: series,
					})
				}
				panel.Series = append(panel.Series, series...)
			}
			panels = append(panels, panel)
		}
		text, err := json.Marshal(panels)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		file := write(t, filepath.Join(dir, "board.html"), strings.Replace(page, "/*DATA*/[]", string(text), 1))
		out, err := filepath.Abs("../../../docs/pictures/" + name + ".png")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
			t.Fatal(err)
		}
		height := map[string]string{"dashboard": "820", "dashboard-agent": "700"}[name]
		cmd := exec.Command(chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--user-data-dir="+dir,
			"--window-size=1200,"+height, "--screenshot="+out, "file://"+file)
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("chromium: %v\n%s", err, text)
		}
		if info, err := os.Stat(out); err != nil || info.Size() > 200_000 || info.Size() < 20_000 {
			t.Errorf("%s: %v, %v; want a picture of less than 200 kB", out, info, err)
		}
	}
}

// lines asks for a matrix, named by the legend and sorted by it.
func (p prometheus) lines(t *testing.T, expr, legend string, begin, end time.Time) []line {
	t.Helper()
	var data struct{ Result []sample }
	seconds := func(at time.Time) string { return strconv.FormatInt(at.Unix(), 10) }
	if err := p.get("/api/v1/query_range", url.Values{"query": {expr}, "start": {seconds(begin)}, "end": {seconds(end)}, "step": {"2"}}, &data); err != nil {
		t.Fatal(err)
	}
	var all []line
	for _, s := range data.Result {
		l := line{Name: regexp.MustCompile(`{{(\w+)}}`).ReplaceAllStringFunc(legend, func(label string) string { return s.Metric[strings.Trim(label, "{}")] })}
		if legend == "" {
			l.Name = s.Metric["unit"]
		}
		for _, v := range s.Values {
			text, _ := v[1].(string)
			at, _ := v[0].(float64)
			value, err := strconv.ParseFloat(text, 64)
			if err != nil {
				t.Fatalf("%s: %v", expr, err)
			}
			l.Points = append(l.Points, [2]float64{at, value})
		}
		all = append(all, l)
	}
	slices.SortFunc(all, func(a, b line) int { return cmp.Compare(a.Name, b.Name) })
	return all
}
