package exporter

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc/codes"

	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// protocols runs a test over both.
func protocols(t *testing.T, f func(t *testing.T, protocol string, server otlptest.Config)) {
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		t.Run(protocol, func(t *testing.T) {
			f(t, protocol, otlptest.Config{HTTP: protocol != "grpc"})
		})
	}
}

// agent is an Exporter in the agent's pipeline.
type agent struct {
	host
	*Exporter
	log logged
}

func newAgent(t *testing.T, endpoint string, cfg Config) *agent {
	t.Helper()
	if endpoint != "" {
		if cfg.OTLP == nil {
			cfg.OTLP = &otlp.Config{}
		}
		cfg.OTLP = to(endpoint, *cfg.OTLP)
	}
	a := &agent{}
	cfg.Source, cfg.Logger = &a.host, a.log.logger()
	exp, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	a.Exporter = exp
	a.meter(t, exp)
	if err := exp.Register(a.provider.Meter("exporter"), "h"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		err := a.provider.Shutdown(ctx)
		if err != nil && ctx.Err() == nil && !errors.Is(err, sdkmetric.ErrReaderShutdown) && !errors.Is(err, sdkmetric.ErrExporterShutdown) {
			t.Errorf("shutdown: %v", err)
		}
	})
	return a
}

// to completes cfg with an endpoint, which is a URL, as package config would.
func to(endpoint string, cfg otlp.Config) *otlp.Config {
	if cfg.Protocol == "http/protobuf" {
		cfg.Endpoint = endpoint + "/v1/metrics"
		return &cfg
	}
	scheme, address, _ := strings.Cut(endpoint, "://")
	cfg.Endpoint, cfg.Insecure = address, scheme != "https"
	return &cfg
}

// drained returns when all is delivered, whatever happens before that.
func (a *agent) drained(t *testing.T) {
	t.Helper()
	eventually(t, "all is delivered", func() bool { return a.ForceFlush(t.Context()) == nil })
}

// eventually waits until ok, for as long as a loaded machine may need.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came to this: %s", what)
		}
	}
}

// values returns the received values of one series, in order.
func values(points []otlptest.Point, metric, unit, direction string) (values []int64) {
	for _, p := range points {
		if p.Metric == metric && p.Attrs["systemd.unit.name"] == unit && p.Attrs["network.io.direction"] == direction {
			values = append(values, p.Value)
		}
	}
	return values
}

func TestExportEndToEnd(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		for name, outbox := range map[string]Outbox{"direct": nil, "outbox": &memory{}} {
			t.Run(name, func(t *testing.T) {
				server := otlptest.Start(t, cfg)
				a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}, Outbox: outbox})
				for i := range uint64(3) {
					now := at(float64(100 + 10*i))
					if err := a.cycle(unit("a.service", at(7), now, 1000+i), overflow(at(0), now, 5)); err != nil {
						t.Fatal(err)
					}
				}
				points := server.Points()
				if got := fmt.Sprint(values(points, receiver.IOName, "a.service", "transmit")); got != "[2000 2002 2004]" {
					t.Errorf("transmitted bytes %s", got)
				}
				if got := fmt.Sprint(values(points, receiver.PacketCountName, "a.service", "receive")); got != "[3000 3003 3006]" {
					t.Errorf("received packets %s", got)
				}
				overflow := 0
				for _, p := range points {
					switch {
					case p.Attrs["systemd.unit.name"] == "a.service" && (!p.Start.Equal(at(7)) || p.Time.Before(at(100)) || p.Time.After(at(120))):
						t.Errorf("wrong times: %v", p)
					case p.Attrs["otel.metric.overflow"] != "":
						overflow++
					}
				}
				if overflow != 3*4 {
					t.Errorf("%d points of the overflow series, want 12", overflow)
				}
				// The first cycle told 0 sent, the third knows of two cycles.
				sent := int64(-1)
				for _, p := range points {
					if p.Metric == "unitmeter.export.sent" {
						sent = p.Value
					}
				}
				if want := int64(2 * (8 + 3)); sent != want {
					t.Errorf("unitmeter.export.sent is %d, want %d", sent, want)
				}
				if h := a.Health(); h.Err != nil || h.Sent != 3*(8+3) || h.Dropped+h.Rejected != 0 {
					t.Errorf("health %+v", h)
				}
				if !strings.Contains(server.Requests()[0].Header["user-agent"], "OTel Go OTLP over") {
					t.Errorf("user agent %q", server.Requests()[0].Header["user-agent"])
				}
				a.log.want(t, "", 0)
			})
		}
	})
}

func TestFailuresAreLoggedOnChangeAndCollectionGoesOn(t *testing.T) {
	t.Parallel() // it waits most of the time
	type script struct {
		name    string
		answers []otlptest.Answer // to the first requests
		logs    string            // a text that is logged once
	}
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		for _, test := range []script{
			{"unavailable", []otlptest.Answer{{Code: codes.Unavailable, Message: "warming up"}, {Code: codes.Unavailable, Message: "warming up"}}, "warming up"},
			{"throttled", []otlptest.Answer{{Code: codes.ResourceExhausted, RetryAfter: time.Second}}, "cannot deliver metrics"},
			{"bad data", []otlptest.Answer{{Code: codes.InvalidArgument, Message: "too old"}}, "too old"},
			{"hangs up", []otlptest.Answer{{Hangup: true}}, "cannot deliver metrics"},
			{"partial success", []otlptest.Answer{{Rejected: 3, Message: "3 too many"}, {Rejected: 3, Message: "3 too many"}}, "3 too many"},
		} {
			t.Run(test.name, func(t *testing.T) {
				cfg := cfg
				cfg.Script = test.answers
				server := otlptest.Start(t, cfg)
				a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}})
				for i := range uint64(4) {
					_ = a.cycle(unit("a.service", at(0), at(float64(100+10*i)), 100+i)) // its error is the answer
					a.drained(t)
				}
				if got := fmt.Sprint(values(server.Points(), receiver.IOName, "a.service", "receive")); got != "[100 101 102 103]" {
					t.Errorf("the receiver has %s", got)
				}
				a.log.want(t, test.logs, 1)
				if strings.Contains(test.name, "partial") {
					if h := a.Health(); h.Rejected != 6 {
						t.Errorf("rejected %d points, want 6", h.Rejected)
					}
					return
				}
				a.log.want(t, "cannot deliver metrics", 1)
				a.log.want(t, "metrics are delivered again", 1)
			})
		}
	})
}

func TestReceiverDownAndBack(t *testing.T) {
	t.Parallel() // it waits most of the time
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		server := otlptest.Start(t, cfg)
		server.Stop()
		// Time for a call to be refused: one that is cut short has another cause.
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol, Timeout: time.Minute}})
		for i := range uint64(3) {
			_ = a.cycle(unit("a.service", at(0), at(float64(100+10*i)), 100+i)) // its error is the outage
		}
		if a.Health().Err == nil {
			t.Error("health is good without a receiver")
		}
		a.log.want(t, "cannot deliver metrics", 1)
		a.log.want(t, "OTEL_EXPORTER_OTLP_ENDPOINT and that the receiver runs there", 1)
		cfg.Address = server.Address()
		server = otlptest.Start(t, cfg)
		a.drained(t) // gRPC dials again in its own time
		if got := fmt.Sprint(values(server.Points(), receiver.IOName, "a.service", "receive")); got != "[100 101 102]" {
			t.Errorf("the receiver has %s", got)
		}
		a.log.want(t, "cannot deliver metrics", 1)
		a.log.want(t, "metrics are delivered again", 1)
		if a.Health().Err != nil {
			t.Errorf("health %+v after recovery", a.Health())
		}
	})
}

func TestSlowReceiverDoesNotHoldUpCycles(t *testing.T) {
	t.Parallel() // it waits most of the time
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		cfg.Script = []otlptest.Answer{{Delay: time.Minute}}
		server := otlptest.Start(t, cfg)
		box := &memory{}
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol, Timeout: 2 * time.Second}, Outbox: box})
		for i := range uint64(4) {
			a.see(unit("a.service", at(0), at(float64(100+10*i)), 100+i))
			if err := a.Export(t.Context(), collected(a.Last().State.Series...)); err != nil {
				t.Fatal(err)
			}
		}
		if len(box.cycles) != 4 {
			t.Errorf("%d cycles are committed, want 4", len(box.cycles))
		}
		a.drained(t)
		a.log.want(t, "no answer within the time of OTEL_EXPORTER_OTLP_TIMEOUT", 1)
		// The slow request was read by the server, then given up, then sent
		// again: at least once, in order.
		if got := fmt.Sprint(values(server.Points(), receiver.IOName, "a.service", "receive")); !strings.HasSuffix(got, "100 101 102 103]") {
			t.Errorf("the receiver has %s", got)
		}
	})
}

func TestOutboxKeepsCyclesOverAnOutage(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		server := otlptest.Start(t, cfg)
		server.Stop()
		box := &memory{}
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}, Outbox: box})
		var want []int64
		for i := range uint64(20) {
			a.cycle(unit("a.service", at(0), at(float64(100+10*i)), 100+i)) // its error is the outage
			want = append(want, int64(100+i))
		}
		if got := len(box.cycles); got != 20 {
			t.Fatalf("%d cycles are committed, want 20", got)
		}
		for i, c := range box.cycles {
			if c.Sweep == nil || c.Sweep.State.Series[0].Total.Received.Bytes != uint64(100+i) || c.Points != 4+3 || c.Request == nil {
				t.Fatalf("cycle %d: %+v", i, c)
			}
		}
		// The agent ends with all of it undelivered, and another one starts.
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- a.provider.Shutdown(ctx) }()
		want = append(want, 119) // the last cycle, made by the shutdown
		eventually(t, "the last cycle is committed", func() bool { return box.pending() == 21 })
		cancel() // the receiver is not waited for any longer
		if err := <-ended; err != nil {
			t.Errorf("shutdown during an outage: %v", err)
		}
		if box.pending() != 21 {
			t.Fatalf("%d requests are left, want 21", box.pending())
		}
		cfg.Address = server.Address()
		server = otlptest.Start(t, cfg)
		b := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}, Outbox: box})
		// Without a cycle of its own.
		server.Wait(t, func([]otlptest.Request) bool { return len(server.Points()) >= 21*7 })
		if err := b.ForceFlush(t.Context()); err != nil {
			t.Fatal(err)
		}
		points := server.Points()
		if got := values(points, receiver.IOName, "a.service", "receive"); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("the receiver has %v, want %v", got, want)
		}
		times := 0
		for _, p := range points {
			if p.Metric == receiver.IOName && p.Attrs["network.io.direction"] == "receive" {
				if i := min(times, 19); !p.Time.Equal(at(float64(100 + 10*i))) {
					t.Errorf("point %d has the time %v, want that of its sweep", times, p.Time)
				}
				times++
			}
		}
		if box.pending() != 0 {
			t.Errorf("%d requests are left", box.pending())
		}
	})
}

func TestBrokenOutboxSendsFromMemory(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		server := otlptest.Start(t, cfg)
		box := &memory{}
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}, Outbox: box, Temporality: "delta"})
		for i := range uint64(9) {
			box.set(func(m *memory) { m.failCommit = nil })
			if i >= 3 && i < 6 {
				box.set(func(m *memory) { m.failCommit = errors.New("no space left on device") })
			}
			if err := a.cycle(unit("a.service", at(0), at(float64(100+10*i)), 100+10*i)); err != nil {
				t.Fatal(err)
			}
		}
		if got := fmt.Sprint(values(server.Points(), receiver.IOName, "a.service", "receive")); got != "[100 10 10 10 10 10 10 10 10]" {
			t.Errorf("deltas %s", got)
		}
		if len(box.cycles) != 6 {
			t.Errorf("%d cycles are committed, want 6", len(box.cycles))
		}
		a.log.want(t, "cannot commit to the outbox", 1)
		a.log.want(t, "cycles are committed to the outbox again", 1)
	})
}

// While older cycles wait in an outbox that takes no new ones, nothing overtakes
// them.
func TestMemoryDoesNotOvertakeTheOutbox(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		var down atomic.Bool
		down.Store(true)
		cfg.Decide = func(otlptest.Request) otlptest.Answer {
			if down.Load() {
				return otlptest.Answer{Code: codes.Unavailable}
			}
			return otlptest.Answer{}
		}
		server := otlptest.Start(t, cfg)
		box := &memory{}
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}, Outbox: box, Temporality: "delta"})
		n := uint64(0)
		cycle := func() {
			n++
			_ = a.cycle(unit("a.service", at(0), at(float64(10*n)), 10*n)) // it says that entries are held
		}
		for range 3 {
			cycle()
		}
		box.set(func(m *memory) { m.failCommit = errors.New("no space left on device") })
		down.Store(false)
		for box.pending() > 0 {
			cycle()
		}
		a.drained(t)
		cycle()
		server.Wait(t, func([]otlptest.Request) bool {
			sum, until := int64(0), at(0)
			for _, p := range server.Points() {
				if p.Metric != receiver.IOName || p.Attrs["network.io.direction"] != "receive" {
					continue
				}
				if !p.Start.Equal(until) {
					t.Fatalf("a delta does not follow on the one before, until %v: %v", until, p)
				}
				until = p.Time
				sum += p.Value
			}
			return sum == int64(10*n)
		})
	})
}

// Without a state, requests wait in memory. They are thinned there, and their deltas
// are still those of all units, also of one that has come and gone meanwhile.
func TestDeltasInMemory(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		var down atomic.Bool
		down.Store(true)
		cfg.Decide = func(otlptest.Request) otlptest.Answer {
			if down.Load() {
				return otlptest.Answer{Code: codes.Unavailable}
			}
			return otlptest.Answer{}
		}
		server := otlptest.Start(t, cfg)
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}, Temporality: "delta"})
		for i := range uint64(20) {
			now := at(float64(100 + 10*i))
			list := []ledger.Series{unit("a.service", at(0), now, 100+10*i)}
			if i == 7 {
				list = append(list, unit("short.service", at(165), now, 5))
			}
			_ = a.cycle(list...) // its error is the outage
		}
		down.Store(false)
		a.drained(t)
		until, sum := at(0), int64(0)
		for _, p := range server.Points() {
			if p.Metric == receiver.IOName && p.Attrs["network.io.direction"] == "receive" && p.Attrs["systemd.unit.name"] == "a.service" {
				if !p.Delta || !p.Start.Equal(until) {
					t.Errorf("no delta from %v on: %v", until, p)
				}
				until = p.Time
				sum += p.Value
			}
		}
		if sum != 290 || !until.Equal(at(290)) {
			t.Errorf("deltas of %d until %v", sum, until)
		}
		if got := fmt.Sprint(values(server.Points(), receiver.IOName, "short.service", "receive")); got != "[5]" {
			t.Errorf("of the unit that has gone: %s", got)
		}
		if n := len(server.Requests()); n > 3+10 {
			t.Errorf("%d calls for 20 cycles in memory", n)
		}
		if kind := a.Temporality(sdkmetric.InstrumentKindHistogram); kind != metricdata.DeltaTemporality {
			t.Errorf("histograms are %v", kind)
		}
	})
}

// What is in memory when the agent ends is lost. It is said and counted.
func TestShutdownWithoutAState(t *testing.T) {
	server := otlptest.Start(t, otlptest.Config{Decide: func(otlptest.Request) otlptest.Answer { return otlptest.Answer{Code: codes.Unavailable} }})
	a := newAgent(t, server.URL(), Config{})
	_ = a.cycle(unit("a.service", at(0), at(100), 5)) // its error is the outage
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Exporter.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if h := a.Health(); h.Dropped != 4+3 {
		t.Errorf("dropped %d points, want 7", h.Dropped)
	}
	a.log.want(t, "the agent ends before the receiver took them", 1)
}

// The rest of a request that was accepted in part is neither lost nor covered by
// the next delta.
func TestSplitInMemoryIsExact(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		cfg.MaxBytes = 4000
		fail := 0
		cfg.Decide = func(r otlptest.Request) otlptest.Answer {
			// Of the first cycle's pieces one is accepted, the next refused.
			if fail++; fail == 2 {
				return otlptest.Answer{Code: codes.Unavailable}
			}
			return otlptest.Answer{}
		}
		server := otlptest.Start(t, cfg)
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}, Temporality: "delta"})
		for i := range uint64(3) {
			var list []ledger.Series
			for j := range 20 {
				list = append(list, unit(fmt.Sprintf("unit-%d.service", j), at(0), at(float64(100+10*i)), 100+10*i))
			}
			_ = a.cycle(list...) // its error is the refusal
			a.drained(t)
		}
		for j := range 20 {
			if got := fmt.Sprint(values(server.Points(), receiver.IOName, fmt.Sprintf("unit-%d.service", j), "receive")); got != "[100 10 10]" {
				t.Errorf("unit %d: deltas %s", j, got)
			}
		}
	})
}

func TestSplittingOfTheOutbox(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		cfg.MaxBytes = 4000
		server := otlptest.Start(t, cfg)
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}, Outbox: &memory{}})
		var list []ledger.Series
		for j := range 50 {
			list = append(list, unit(fmt.Sprintf("unit-%d.service", j), at(0), at(100), uint64(j)))
		}
		if err := a.cycle(list...); err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		for _, p := range server.Points() {
			seen[p.Series()]++
		}
		if len(seen) != 200+3 {
			t.Errorf("%d series arrived, want 203", len(seen))
		}
		for series, n := range seen {
			if n != 1 {
				t.Errorf("%s arrived %d times", series, n)
			}
		}
	})
}

func TestTLSHeadersAndCompressionOverReplay(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		ca := otlptest.NewCA(t)
		cfg.TLS = ca.Server(t, true)
		cert, key := ca.Client(t, "unitmeter-test")
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		settings := trusting(t, ca)
		settings.Certificates = []tls.Certificate{pair}
		client := Config{OTLP: &otlp.Config{Protocol: protocol, TLS: always(settings), Gzip: true}}
		t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "tenant=from%20env,authorization=Bearer%20abc")
		server := otlptest.Start(t, cfg)
		server.Stop()
		box := &memory{}
		client.Outbox = box
		a := newAgent(t, server.URL(), client)
		a.cycle(unit("a.service", at(0), at(100), 5)) // its error is the outage
		cfg.Address = server.Address()
		server = otlptest.Start(t, cfg)
		server.WaitAccepted(t, 1)
		r := server.Requests()[0]
		if r.Header["tenant"] != "from env" || r.Header["authorization"] != "Bearer abc" || r.Encoding != "gzip" || r.ClientCert != "unitmeter-test" {
			t.Errorf("headers %v, encoding %q, client certificate %q", r.Header, r.Encoding, r.ClientCert)
		}
		client.Outbox, client.OTLP.Headers = nil, always(map[string]string{"tenant": "from file"})
		b := newAgent(t, server.URL(), client)
		if err := b.cycle(unit("a.service", at(0), at(100), 5)); err != nil {
			t.Fatal(err)
		}
		requests := server.Requests()
		if r := requests[len(requests)-1]; r.Header["tenant"] != "from file" || r.Header["authorization"] != "" {
			t.Errorf("given headers do not replace the variable's: %v", r.Header)
		}
	})
}

func TestWrongCertificate(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		cfg.TLS = otlptest.NewCA(t).Server(t, false)
		server := otlptest.Start(t, cfg)
		another := trusting(t, otlptest.NewCA(t))
		// Time for all tries: one that is cut short has another cause.
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol, TLS: always(another), Timeout: time.Minute}})
		for i := range 3 {
			_ = a.cycle(unit("a.service", at(0), at(float64(100+10*i)), 5)) // its error is the certificate
		}
		a.log.want(t, "cannot deliver metrics", 1)
		a.log.want(t, "check OTEL_EXPORTER_OTLP_CERTIFICATE", 1)
		if len(server.Requests()) > 0 {
			t.Error("metrics went to a server with an unknown certificate")
		}
	})
}

// trusting is the configuration of a client that trusts one authority.
func trusting(t *testing.T, ca *otlptest.CA) *tls.Config {
	t.Helper()
	pem, err := os.ReadFile(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: x509.NewCertPool()}
	if !cfg.RootCAs.AppendCertsFromPEM(pem) {
		t.Fatalf("%s has no certificate", ca.File)
	}
	return cfg
}

func TestRedirectIsNotSuccess(t *testing.T) {
	portal := otlptest.Start(t, otlptest.Config{HTTP: true})
	server := otlptest.Start(t, otlptest.Config{HTTP: true, Script: []otlptest.Answer{
		{HTTPStatus: 302, Header: map[string]string{"Location": portal.URL()}}, {HTTPStatus: 307, Header: map[string]string{"Location": portal.URL() + "/v1/metrics"}}}})
	a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: "http/protobuf"}})
	for range 2 {
		_ = a.cycle(unit("a.service", at(0), at(100), 5)) // its error is the redirect
	}
	if h := a.Health(); h.Sent != 0 || h.Err == nil {
		t.Errorf("health %+v", h)
	}
	if len(portal.Requests()) > 0 {
		t.Error("metrics and headers went to another host")
	}
}

// A reader that is shut down cancels the export in flight. The cycle it has
// collected must be committed all the same.
func TestExportCommitsUnderACancelledContext(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		box := &memory{}
		a := newAgent(t, "http://127.0.0.1:1", Config{OTLP: &otlp.Config{Protocol: protocol}, Outbox: box})
		a.see(unit("a.service", at(0), at(100), 5))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := a.Export(ctx, collected(a.Last().State.Series...)); err != nil {
			t.Error(err)
		}
		if len(box.cycles) != 1 || box.cycles[0].Request == nil {
			t.Errorf("committed %v", box.cycles)
		}
	})
}

func TestShutdownOrder(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		server := otlptest.Start(t, cfg)
		box := &memory{}
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}, Outbox: box})
		a.see(unit("a.service", at(0), at(100), 5))
		// No cycle yet: the provider's shutdown makes one, commits it, and
		// the drain delivers it.
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if err := a.provider.Shutdown(ctx); err != nil {
			t.Fatal(err)
		}
		if got := values(server.Points(), receiver.IOName, "a.service", "receive"); len(got) != 1 || box.pending() != 0 {
			t.Errorf("received %v, %d left", got, box.pending())
		}
		if err := a.Export(t.Context(), &metricdata.ResourceMetrics{}); !errors.Is(err, sdkmetric.ErrExporterShutdown) {
			t.Errorf("export after shutdown: %v", err)
		}
		if err := a.Exporter.Shutdown(t.Context()); !errors.Is(err, sdkmetric.ErrExporterShutdown) {
			t.Errorf("second shutdown: %v", err)
		}
		if err := a.ForceFlush(t.Context()); err != nil {
			t.Errorf("flush after a complete drain: %v", err)
		}
	})
}

// The end of the agent during a call is no failure of the receiver.
func TestShutdownDuringACall(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		cfg.Decide = func(otlptest.Request) otlptest.Answer { return otlptest.Answer{Delay: time.Minute} }
		server := otlptest.Start(t, cfg)
		box := &memory{}
		a := newAgent(t, server.URL(), Config{OTLP: &otlp.Config{Protocol: protocol}, Outbox: box})
		a.see(unit("a.service", at(0), at(100), 5))
		if err := a.Export(t.Context(), collected(a.Last().State.Series...)); err != nil {
			t.Fatal(err)
		}
		server.Wait(t, func(r []otlptest.Request) bool { return len(r) == 1 })
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := a.Exporter.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		if box.pending() != 1 {
			t.Errorf("%d requests are left, want the one in flight", box.pending())
		}
		a.log.want(t, "", 0)
		if err := a.ForceFlush(t.Context()); !errors.Is(err, sdkmetric.ErrExporterShutdown) {
			t.Errorf("flush of what is left: %v", err)
		}
	})
}

func TestProtocolNoneOnlyCommits(t *testing.T) {
	box := &memory{}
	a := newAgent(t, "", Config{Outbox: box})
	if err := a.cycle(unit("a.service", at(0), at(100), 5)); err != nil {
		t.Fatal(err)
	}
	if len(box.cycles) != 1 || box.cycles[0].Request != nil || box.cycles[0].Sweep != a.Last() {
		t.Errorf("committed %+v", box.cycles)
	}
}

func TestNothingToSendCommitsTheLedger(t *testing.T) {
	server := otlptest.Start(t, otlptest.Config{})
	box := &memory{}
	exp, err := New(t.Context(), Config{OTLP: to(server.URL(), otlp.Config{}), Outbox: box})
	if err != nil {
		t.Fatal(err)
	}
	if err := exp.Export(t.Context(), &metricdata.ResourceMetrics{}); err != nil {
		t.Fatal(err)
	}
	if err := exp.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(box.cycles) != 1 || box.cycles[0].Request != nil || len(server.Requests()) != 0 {
		t.Errorf("committed %+v, sent %d requests", box.cycles, len(server.Requests()))
	}
}

func TestNewRefusesBadSettings(t *testing.T) {
	for name, test := range map[string]struct {
		cfg  Config
		want []string
	}{
		"protocol":    {Config{OTLP: &otlp.Config{Protocol: "http/json", Endpoint: "x:1"}}, []string{"http/json", "OTEL_EXPORTER_OTLP_PROTOCOL"}},
		"temporality": {Config{Temporality: "Delta!"}, []string{"Delta!", "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "lowmemory"}},
		"endpoint":    {Config{OTLP: &otlp.Config{}}, []string{"no endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT"}},
	} {
		t.Run(name, func(t *testing.T) {
			exp, err := New(t.Context(), test.cfg)
			if err == nil {
				exp.Shutdown(t.Context())
				t.Fatal("no error")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not tell %q", err, want)
				}
			}
		})
	}
}

// A connection on which nothing comes through, as after a firewall has forgotten
// it, must not be tried again until TCP gives it up. HTTP/2 would.
func TestDeadConnectionIsReplaced(t *testing.T) {
	t.Parallel() // it waits most of the time
	ca := otlptest.NewCA(t)
	server := otlptest.Start(t, otlptest.Config{HTTP: true, TLS: ca.Server(t, false)})
	door, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var connections atomic.Int64
	var dead atomic.Int64 // connections up to this one
	var forwarding sync.WaitGroup
	forwarding.Go(func() {
		for {
			in, err := door.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", server.Address())
			if err != nil {
				t.Error(err)
				return
			}
			number := connections.Add(1)
			for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
				forwarding.Go(func() {
					defer pair[0].Close()
					defer pair[1].Close()
					for buf := make([]byte, 32<<10); ; {
						n, err := pair[0].Read(buf)
						if err != nil {
							return
						}
						if number > dead.Load() {
							_, _ = pair[1].Write(buf[:n])
						}
					}
				})
			}
		}
	})
	a := newAgent(t, "https://"+door.Addr().String(), Config{OTLP: &otlp.Config{Protocol: "http/protobuf", TLS: always(trusting(t, ca)), Timeout: time.Second}, Outbox: &memory{}})
	t.Cleanup(func() {
		door.Close()
		server.Stop()
		forwarding.Wait()
	})
	for i := range 2 {
		_ = a.cycle(unit("a.service", at(0), at(float64(100+i)), 5)) // its error is the dead connection
		a.drained(t)
		dead.Store(connections.Load())
	}
	if n := connections.Load(); n < 2 {
		t.Errorf("%d connections", n)
	}
}
