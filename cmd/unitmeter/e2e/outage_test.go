package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// These tests compress a long outage: a process of its own has the agent's real
// exporter, outbox and sender, and the SDK in front of them, but its sweeps are
// made up and stamped 10 s apart, as fast as they can be committed. The receiver
// makes up the same sweeps and compares each point.

// fleet makes up the sweeps of a host: the same ones for the same numbers.
type fleet struct {
	rand   *rand.Rand
	active int // units with traffic in each sweep
	now    time.Time
	step   time.Duration
	series []ledger.Series // in the order of the sweep
	epochs []string
}

func newFleet(units, active int, begin time.Time) *fleet {
	f := &fleet{rand: rand.New(rand.NewPCG(1, 2)), active: active, now: begin, step: 10 * time.Second}
	kinds := []string{"postgresql@%d-main.service", "worker-%d.service", "docker-%08x.scope", "nats-%d.socket", "backup-job-%d.service"}
	for i := range units {
		name := fmt.Sprintf(kinds[i%len(kinds)], i)
		f.epochs = append(f.epochs, fmt.Sprintf("%032x", i*7919))
		f.series = append(f.series, ledger.Series{
			ID: ledger.ID{Kind: ledger.Unit, Name: name},
			// Long before, also for a clock that is set back: a total cannot end before it begins.
			Start: begin.Add(-72*time.Hour - time.Duration(f.rand.Int64N(int64(30*24*time.Hour)))), Observed: true,
			Total: ledger.Counters{
				Received: ledger.Traffic{Bytes: f.rand.Uint64N(1e11), Packets: f.rand.Uint64N(1e8)},
				Sent:     ledger.Traffic{Bytes: f.rand.Uint64N(1e11), Packets: f.rand.Uint64N(1e8)},
			},
		})
	}
	return f
}

// pass lets an interval pass.
func (f *fleet) pass() {
	f.now = f.now.Add(f.step + time.Duration(f.rand.Int64N(int64(4*time.Millisecond))))
	for range f.active {
		packets := 1 + f.rand.Uint64N(5000)
		t := &f.series[f.rand.IntN(len(f.series))].Total
		t.Received.Bytes += packets * (60 + f.rand.Uint64N(1000))
		t.Received.Packets += packets
		t.Sent.Bytes += packets * (60 + f.rand.Uint64N(400))
		t.Sent.Packets += packets - packets/5
	}
	for i := range f.series {
		f.series[i].Time = f.now.Add(-time.Duration(len(f.series)-i) * 110 * time.Microsecond)
	}
}

// sweep returns the present state. It shares nothing with the fleet.
func (f *fleet) sweep() *receiver.Sweep {
	state := ledger.State{Time: f.now, Series: slices.Clone(f.series), Runs: make([]ledger.Run, len(f.series))}
	for i, s := range f.series {
		state.Runs[i] = ledger.Run{Unit: s.Name, Series: s.Name, Epoch: f.epochs[i], Boot: "b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0", Last: s.Total, Time: s.Time}
	}
	return receiver.NewSweep(f.now, receiver.Config{HostName: "db-17.example.net"}, state)
}

// outage is how the process is told what to do, by its environment.
type outage struct {
	dir      string
	endpoint string
	units    int
	cycles   int
	begin    time.Time
	jump     time.Duration // added to the clock in the middle, and taken off twice at three quarters
}

func (o outage) fleet() *fleet { return newFleet(o.units, max(o.units/10, 1), o.begin) }

// pass brings the fleet to a cycle, from 0 on, with the clock as it is by then.
func (o outage) pass(f *fleet, cycle int) {
	switch {
	case o.jump == 0:
	case cycle == o.cycles/2:
		f.now = f.now.Add(o.jump)
	case cycle == o.cycles*3/4:
		f.now = f.now.Add(-2 * o.jump)
	}
	f.pass()
}

const outageEnv = "UNITMETER_TEST_OUTAGE"

// start starts the process, and returns when it has committed all cycles.
func (o outage) start(tb testing.TB) *exec.Cmd {
	tb.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestOutage$")
	// The agent sets its memory limits itself (trimMemory); this process has them so.
	cmd.Env = append(os.Environ(), "GOGC=75", "GOMAXPROCS=2", outageEnv+"="+strings.Join([]string{
		o.dir, o.endpoint, strconv.Itoa(o.units), strconv.Itoa(o.cycles), strconv.FormatInt(o.begin.UnixNano(), 10), o.jump.String()}, " "))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	var log strings.Builder
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	end := sync.OnceFunc(func() {
		stdin.Close()
		said, _ := io.ReadAll(stdout)
		if err := cmd.Wait(); err != nil {
			tb.Errorf("the agent's process: %v\n%s\n%s", err, said, log.String())
		}
	})
	tb.Cleanup(end)
	if _, err := io.ReadFull(stdout, make([]byte, len("committed\n"))); err != nil {
		tb.Fatalf("the agent's process has ended: %v\n%s", err, log.String())
	}
	return cmd
}

// commit makes the agent's pipeline and commits all cycles.
func (o outage) commit(t *testing.T) (*exporter.Exporter, *store.Store) {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: o.dir, Merge: otlp.Merge})
	if err != nil {
		t.Fatal(err)
	}
	durable, err := exporter.NewDurable(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	source := &made{}
	exp, err := exporter.New(t.Context(), exporter.Config{
		OTLP: &otlp.Config{Endpoint: o.endpoint, Insecure: true}, Source: source, Sent: durable.Sent(), Outbox: durable,
	})
	if err != nil {
		t.Fatal(err)
	}
	reader := sdkmetric.NewManualReader(sdkmetric.WithTemporalitySelector(exp.Temporality), sdkmetric.WithAggregationSelector(exp.Aggregation))
	meter := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithCardinalityLimit(0)).Meter("unitmeter")
	if err := errors.Join(source.register(meter), exp.Register(meter, "db-17.example.net"), durable.Register(meter, "db-17.example.net")); err != nil {
		t.Fatal(err)
	}
	f := o.fleet()
	for cycle := range o.cycles {
		o.pass(f, cycle)
		source.last = f.sweep()
		var rm metricdata.ResourceMetrics
		if err := reader.Collect(t.Context(), &rm); err != nil {
			t.Fatal(err)
		}
		if err := exp.Export(t.Context(), &rm); err != nil {
			t.Fatal(err)
		}
	}
	return exp, s
}

// fill leaves the state of an agent that committed all cycles and sent none.
func (o outage) fill(t *testing.T) {
	t.Helper()
	exp, s := o.commit(t)
	ended, end := context.WithCancel(t.Context())
	end()
	if err := errors.Join(exp.Shutdown(ended), s.Close()); err != nil {
		t.Fatal(err)
	}
}

// run is the process: it commits all cycles, and then sends them until its
// standard input ends.
func (o outage) run(t *testing.T) {
	exp, s := o.commit(t)
	defer s.Close()
	if health := exp.Health(); health.Err == nil || health.Sent > 0 {
		t.Errorf("there was no outage: %+v", health)
	}
	fmt.Println("committed")
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		t.Fatal(err)
	}
	if err := exp.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if health := exp.Health(); health.Rejected > 0 || health.Dropped > 0 || health.Sent < int64(o.cycles*o.units*4) {
		t.Errorf("after the outage: %+v", health)
	}
}

// made is a Source of sweeps that are made up.
type made struct{ last *receiver.Sweep }

func (m *made) Last() *receiver.Sweep { return m.last }

func (m *made) register(meter metric.Meter) error {
	bytes, err := meter.Int64ObservableCounter(receiver.IOName, metric.WithUnit("By"))
	if err != nil {
		return err
	}
	packets, err := meter.Int64ObservableCounter(receiver.PacketCountName, metric.WithUnit("{packet}"))
	if err != nil {
		return err
	}
	_, err = meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		for s, attributes := range m.last.All() {
			in, out := metric.WithAttributeSet(attributes.Receive), metric.WithAttributeSet(attributes.Transmit)
			o.ObserveInt64(bytes, int64(s.Total.Received.Bytes), in)
			o.ObserveInt64(bytes, int64(s.Total.Sent.Bytes), out)
			o.ObserveInt64(packets, int64(s.Total.Received.Packets), in)
			o.ObserveInt64(packets, int64(s.Total.Sent.Packets), out)
		}
		return nil
	}, bytes, packets)
	return err
}

// tape is an OTLP/gRPC receiver that compares each point of the units with the
// sweep that it must be of. It reads the wire itself: decoded in full, a day of
// outage would take longer here than in the agent.
type tape struct {
	outage outage

	mu      sync.Mutex
	fleet   *fleet
	index   map[string]int // of a metric and the attributes in their order on the wire: 4 for each series
	seen    []bool         // by index, of the cycle whose points come now
	left    int            // points of it that have not come
	cycles  int            // begun
	points  int
	problem error // the first one
}

func newTape(o outage) *tape {
	r := &tape{outage: o, fleet: o.fleet(), index: map[string]int{}, seen: make([]bool, 4*o.units)}
	i := -1
	for _, attributes := range r.fleet.sweep().All() {
		i++
		for j, set := range []attribute.Set{attributes.Receive, attributes.Transmit} {
			for k, name := range []string{receiver.IOName, receiver.PacketCountName} {
				key := []byte(name)
				for _, kv := range set.ToSlice() {
					key = append(key, keyValue(string(kv.Key), kv.Value.AsString())...)
				}
				r.index[string(key)] = 4*i + 2*j + k
			}
		}
	}
	return r
}

// serve serves on l until the test ends.
func (r *tape) serve(tb testing.TB, l net.Listener) {
	server := grpc.NewServer(grpc.ForceServerCodecV2(passed{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var request []byte
		if err := stream.RecvMsg(&request); err != nil {
			return err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if err := r.take(request); err != nil && r.problem == nil {
			r.problem = fmt.Errorf("after %d points of %d cycles: %w", r.points, r.cycles, err)
		}
		return stream.SendMsg([]byte{}) // all accepted
	}))
	serveUntilEnd(tb, l, server)
}

// take compares the points of one request, which may be of several cycles.
func (r *tape) take(request []byte) error {
	return fields(request, func(n protowire.Number, resource []byte, _ uint64) error {
		return fields(resource, func(n protowire.Number, scope []byte, _ uint64) error {
			if n != 2 {
				return nil
			}
			return fields(scope, func(n protowire.Number, m []byte, _ uint64) error {
				if n != 2 {
					return nil
				}
				name := ""
				return fields(m, func(n protowire.Number, body []byte, _ uint64) error {
					switch {
					case n == 1:
						name = string(body)
					case n == 7 && (name == receiver.IOName || name == receiver.PacketCountName):
						return fields(body, func(n protowire.Number, p []byte, _ uint64) error {
							if n != 1 {
								return nil
							}
							return r.point(name, p)
						})
					}
					return nil
				})
			})
		})
	})
}

func (r *tape) point(name string, p []byte) error {
	var value uint64
	var start, at int64
	key := append(make([]byte, 0, 256), name...)
	err := fields(p, func(n protowire.Number, body []byte, v uint64) error {
		switch n {
		case 2:
			start = int64(v)
		case 3:
			at = int64(v)
		case 6:
			value = v
		case 7:
			key = append(key, body...)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if r.left == 0 {
		if r.cycles == r.outage.cycles {
			return fmt.Errorf("a point comes after the last one: %q %d", key, value)
		}
		r.outage.pass(r.fleet, r.cycles)
		r.cycles++
		r.left = len(r.seen)
		clear(r.seen)
	}
	i, ok := r.index[string(key)]
	if !ok || r.seen[i] {
		return fmt.Errorf("a point comes twice, out of its order, or is of no unit: %q at %s", key, time.Unix(0, at))
	}
	s := r.fleet.series[i/4]
	want := [4]uint64{s.Total.Received.Bytes, s.Total.Received.Packets, s.Total.Sent.Bytes, s.Total.Sent.Packets}[i%4]
	if value != want || start != s.Start.UnixNano() || at != s.Time.UnixNano() {
		return fmt.Errorf("%q is %d from %s at %s, want %d from %s at %s", key, value, time.Unix(0, start), time.Unix(0, at), want, s.Start, s.Time)
	}
	r.seen[i] = true
	r.left--
	r.points++
	return nil
}

// keyValue is an attribute on the wire.
func keyValue(key, value string) []byte {
	v := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), value)
	kv := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), key)
	return protowire.AppendBytes(protowire.AppendTag(kv, 2, protowire.BytesType), v)
}

// fields calls f for each field of a message, with its bytes or its number.
func fields(message []byte, f func(n protowire.Number, body []byte, v uint64) error) error {
	for len(message) > 0 {
		n, kind, size := protowire.ConsumeTag(message)
		if size < 0 {
			return protowire.ParseError(size)
		}
		message = message[size:]
		var body []byte
		var v uint64
		switch kind {
		case protowire.BytesType:
			body, size = protowire.ConsumeBytes(message)
		case protowire.Fixed64Type:
			v, size = protowire.ConsumeFixed64(message)
		default:
			size = protowire.ConsumeFieldValue(n, kind, message)
		}
		if size < 0 {
			return protowire.ParseError(size)
		}
		message = message[size:]
		if err := f(n, body, v); err != nil {
			return err
		}
	}
	return nil
}

// passed is the codec of a server that reads the wire itself.
type passed struct{}

func (passed) Name() string { return "proto" }

func (passed) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (passed) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// check wants all cycles to have come.
func (r *tape) check(tb testing.TB) {
	tb.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.problem != nil {
		tb.Error(r.problem)
	}
	if want := r.outage.cycles * r.outage.units * 4; r.points != want {
		tb.Errorf("%d points have arrived, want %d", r.points, want)
	}
}

// backlog reads the outbox of a running agent.
func backlog(tb testing.TB, dir string) store.Backlog {
	tb.Helper()
	r, err := store.OpenReader(tb.Context(), dir)
	if err != nil {
		tb.Fatal(err)
	}
	defer r.Close()
	b, err := r.Backlog(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// drained waits until nothing is left in the outbox.
func drained(tb testing.TB, dir string) {
	tb.Helper()
	for end := time.Now().Add(10 * time.Minute); backlog(tb, dir).Requests > 0; time.Sleep(500 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("the outbox does not get empty: %+v", backlog(tb, dir))
		}
	}
}

// TestOutage commits cycles while nobody listens. Every point must arrive once,
// in the order of its commit, with the time at which it was measured, also when
// the clock jumps meanwhile.
func TestOutage(t *testing.T) {
	if told := strings.Fields(os.Getenv(outageEnv)); len(told) == 6 {
		o := outage{dir: told[0], endpoint: told[1]}
		o.units, _ = strconv.Atoi(told[2])
		o.cycles, _ = strconv.Atoi(told[3])
		begin, _ := strconv.ParseInt(told[4], 10, 64)
		o.begin = time.Unix(0, begin)
		o.jump, _ = time.ParseDuration(told[5])
		o.run(t)
		return
	}
	t.Parallel()
	for name, jump := range map[string]time.Duration{"an hour": 0, "clock set forward, then back": 36 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := outage{dir: filepath.Join(t.TempDir(), "state"), endpoint: otlptest.FreeAddress(t), units: 20, cycles: 360, jump: jump}
			o.begin = time.Now().Add(-time.Duration(o.cycles) * 10 * time.Second)
			o.start(t)
			if b := backlog(t, o.dir); b.Requests != o.cycles {
				t.Fatalf("%+v, want %d requests", b, o.cycles)
			}
			l, err := net.Listen("tcp", o.endpoint)
			if err != nil {
				t.Fatal(err)
			}
			r := newTape(o)
			r.serve(t, l)
			drained(t, o.dir)
			r.check(t)
		})
	}
}

// BenchmarkOutage is a day of outage at 10 s with 1,000 units, of which one in
// ten is active in each cycle, and the catching up after it: with a receiver that
// compares each point, and with a real Collector.
//
//	make bench BENCH=BenchmarkOutage PKG=./cmd/unitmeter/e2e TESTFLAGS='-benchtime 1x'
func BenchmarkOutage(b *testing.B) {
	b.Run("compared", func(b *testing.B) {
		benchmarkOutage(b, func(o outage) (check func()) {
			l, err := net.Listen("tcp", o.endpoint)
			if err != nil {
				b.Fatal(err)
			}
			r := newTape(o)
			r.serve(b, l)
			return func() { r.check(b) }
		})
	})
	b.Run("otelcol", func(b *testing.B) {
		benchmarkOutage(b, func(o outage) (check func()) {
			config := filepath.Join(b.TempDir(), "config.yaml")
			text := "receivers: {otlp: {protocols: {grpc: {endpoint: '" + o.endpoint + "'}}}}\nexporters: {nop: {}}\n" +
				"service: {pipelines: {metrics: {receivers: [otlp], exporters: [nop]}}, telemetry: {metrics: {level: none}}}\n"
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				b.Fatal(err)
			}
			collector := exec.Command(tool(b, "otelcol"), "--config="+config)
			if err := collector.Start(); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() {
				_ = collector.Process.Kill()
				_ = collector.Wait()
			})
			return func() {} // the agent's process checks that all was taken
		})
	})
}

func benchmarkOutage(b *testing.B, receive func(outage) (check func())) {
	for range b.N {
		o := outage{dir: filepath.Join(b.TempDir(), "state"), endpoint: otlptest.FreeAddress(b), units: 1000, cycles: 24 * 360}
		o.begin = time.Now().Add(-time.Duration(o.cycles) * 10 * time.Second)
		began := time.Now()
		cmd := o.start(b)
		b.ReportMetric(float64(time.Since(began).Milliseconds())/float64(o.cycles), "commit-ms")
		b.ReportMetric(memory(b, fmt.Sprintf("/proc/%d/status", cmd.Process.Pid), "VmHWM"), "outage-rss-MiB")
		size := 0.0
		for _, suffix := range []string{"", "-wal", "-shm"} {
			info, err := os.Stat(filepath.Join(o.dir, "unitmeter.db"+suffix))
			if err != nil {
				b.Fatal(err)
			}
			size += float64(info.Size())
		}
		b.ReportMetric(size/1e6, "disk-MB")
		b.ReportMetric(float64(backlog(b, o.dir).Bytes)/1e6, "backlog-MB")
		began = time.Now()
		check := receive(o)
		drained(b, o.dir)
		b.ReportMetric(time.Since(began).Seconds(), "drain-s")
		b.ReportMetric(memory(b, fmt.Sprintf("/proc/%d/status", cmd.Process.Pid), "VmHWM"), "peak-rss-MiB")
		check()
	}
}
