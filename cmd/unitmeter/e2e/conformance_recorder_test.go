package e2e

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/grpc"
	_ "google.golang.org/grpc/encoding/gzip" // the server takes gzip, as a Collector does

	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// recorder is an OTLP/gRPC receiver that keeps the sum of what arrived for each
// series, and checks each point on its way in. It keeps no requests, so that it
// can stand 100,000 units.
type recorder struct {
	colmetricpb.UnimplementedMetricsServiceServer

	mu      sync.Mutex
	series  map[string]*trail
	gauges  map[string]int64 // the last value of each of the agent's own instruments
	reached time.Time        // of the last point of these
	// collections is how many times the agent has measured these, as of collected.
	collections int
	collected   time.Time
	problems    []string
	// redelivered counts points that came twice. An agent that is killed between
	// the delivery and its note of it must send again (OTLP, "Duplicate Data").
	redelivered int
	// unsteady says that the agent's wall clock is stepped back, so that a point
	// can be earlier than the one before.
	unsteady bool
}

// trail is what a recorder knows of one series.
type trail struct {
	point otlptest.Point // the last one
	first time.Time      // start of the first point
	total int64          // the last cumulative value, or the sum of the deltas
	seen  []stamped      // the last points, to tell a redelivery from an overlap
}

type stamped struct {
	time  time.Time
	value int64
}

// redeliveries is how many points of each series can be recognized when they
// come again.
const redeliveries = 64

func newRecorder() *recorder {
	return &recorder{series: map[string]*trail{}, gauges: map[string]int64{}}
}

// serve has an OTLP receiver answer on l until the test ends. It can answer on
// several listeners.
func serve(tb testing.TB, l net.Listener, r colmetricpb.MetricsServiceServer) {
	server := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	colmetricpb.RegisterMetricsServiceServer(server, r)
	serveUntilEnd(tb, l, server)
}

// serveUntilEnd has the server answer on l until the test ends.
func serveUntilEnd(tb testing.TB, l net.Listener, server *grpc.Server) {
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	tb.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			tb.Errorf("the OTLP receiver: %v", err)
		}
	})
}

// Export implements the OTLP service.
func (r *recorder) Export(_ context.Context, request *colmetricpb.ExportMetricsServiceRequest) (*colmetricpb.ExportMetricsServiceResponse, error) {
	points := otlptest.Flatten(request)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range points {
		switch p.Metric {
		case receiver.IOName, receiver.PacketCountName, receiver.UnattributedName:
			r.take(p)
		default:
			r.gauges[p.Series()] = p.Value
			if p.Metric == "unitmeter.sweep.partial" && p.Time.After(r.collected) {
				r.collections, r.collected = r.collections+1, p.Time
			}
			r.reached = p.Time
		}
	}
	return &colmetricpb.ExportMetricsServiceResponse{}, nil
}

// take puts one point on its series. The caller holds mu.
func (r *recorder) take(p otlptest.Point) {
	key := p.Series()
	s, ok := r.series[key]
	if !ok {
		s = &trail{first: p.Start}
		r.series[key] = s
	}
	problem := func(text string) {
		r.problems = append(r.problems, text+fmt.Sprintf("\n\tbefore: %s\n\tnow:    %s", s.point, p))
	}
	if ok && !p.Time.After(s.point.Time) {
		if slices.Contains(s.seen, stamped{p.Time, p.Value}) {
			r.redelivered++
			return
		}
		if !r.unsteady {
			problem("a point is not after the one before")
			return
		}
	}
	switch {
	case p.Value < 0:
		problem("a value is negative")
	case p.Start.IsZero() || p.Start.After(p.Time):
		problem("a point has no start before its time")
	case p.Delta && ok && p.Start.Before(s.point.Time) && !r.unsteady:
		problem("a delta overlaps with the one before")
	case !p.Delta && ok && !p.Start.Equal(s.first):
		problem("the start has moved")
	case !p.Delta && p.Value < s.total:
		problem("a total has fallen")
	}
	if p.Delta {
		s.total += p.Value
	} else {
		s.total = p.Value
	}
	s.point = p
	if len(s.seen) == redeliveries {
		s.seen = slices.Delete(s.seen, 0, redeliveries/2)
	}
	s.seen = append(s.seen, stamped{p.Time, p.Value})
}

// sum adds up the series of all units for which is returns true; "" stands for
// the overflow series.
func (r *recorder) sum(is func(unit string) bool) (total systemd.Counters) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.series {
		if s.point.Metric == receiver.UnattributedName || !is(s.point.Attrs["systemd.unit.name"]) {
			continue
		}
		*counterOf(&total, point{metric: s.point.Metric, direction: s.point.Attrs["network.io.direction"]}) += uint64(s.total)
	}
	return total
}

// unattributed returns what arrived as unattributed of a slice.
func (r *recorder) unattributed(slice string) (total systemd.Counters) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.series {
		if s.point.Metric == receiver.UnattributedName && s.point.Attrs["systemd.unit.slice"] == slice {
			*counterOf(&total, point{metric: receiver.IOName, direction: s.point.Attrs["network.io.direction"]}) += uint64(s.total)
		}
	}
	return total
}

// names returns the units that have series and for which is returns true.
func (r *recorder) names(is func(unit string) bool) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	found := map[string]bool{}
	for _, s := range r.series {
		if unit := s.point.Attrs["systemd.unit.name"]; s.point.Metric == receiver.IOName && is(unit) {
			found[unit] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// began returns when the first point of a unit's sent bytes says that counting
// began; zero if there is none.
func (r *recorder) began(unit string) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.series {
		if s.point.Metric == receiver.IOName && s.point.Attrs["systemd.unit.name"] == unit && s.point.Attrs["network.io.direction"] == "transmit" {
			return s.first
		}
	}
	return time.Time{}
}

// health returns the last value of one of the agent's own instruments, summed
// over its attributes.
func (r *recorder) health(name string) (sum int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for series, value := range r.gauges {
		if strings.HasPrefix(series, name+"{") {
			sum += value
		}
	}
	return sum
}

// wrong returns what was wrong with the points so far.
func (r *recorder) wrong() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.problems)
}
