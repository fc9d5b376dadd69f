package e2e

import (
	"maps"
	"testing"
	"time"
)

// BenchmarkGC compares settings of the garbage collector at 1,000 units, one in
// ten active: the agent's own (see frugal), and constant ones that the Go
// runtime reads in the environment. docs/decisions/weight.md has the figures.
//
//	make bench PKG=./cmd/unitmeter/e2e BENCH=BenchmarkGC TESTFLAGS='-collections 30'
func BenchmarkGC(b *testing.B) {
	const units, active = 1000, 10
	rig := startLoad(b, units, active)
	for _, agent := range ourContenders(b, time.Second) {
		for _, setting := range []struct{ name, gogc, limit string }{
			{"own", "", ""},
			{"GOGC=100", "100", ""},
			{"GOGC=100,GOMEMLIMIT=10MiB", "100", "10MiB"},
		} {
			a := agent
			a.env = maps.Clone(agent.env)
			if setting.gogc != "" {
				a.env["GOGC"] = setting.gogc
			}
			if setting.limit != "" {
				a.env["GOMEMLIMIT"] = setting.limit
			}
			b.Run(agent.slug()+"/"+setting.name, func(b *testing.B) {
				measure(b, rig, a, units, *collections)
			})
		}
	}
}
