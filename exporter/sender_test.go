package exporter

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	metricpb "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/protobuf/proto"

	"github.com/unitmeter/unitmeter/exporter/otlp"
)

// requestOf serializes a sum of deltas with the given values; pad bytes make it larger.
func requestOf(t testing.TB, pad int, values ...int64) []byte {
	t.Helper()
	var points []*metricpb.NumberDataPoint
	for _, v := range values {
		points = append(points, &metricpb.NumberDataPoint{Value: &metricpb.NumberDataPoint_AsInt{AsInt: v}})
	}
	b, err := proto.Marshal(&colmetricpb.ExportMetricsServiceRequest{ResourceMetrics: []*metricpb.ResourceMetrics{{
		ScopeMetrics: []*metricpb.ScopeMetrics{{Metrics: []*metricpb.Metric{{
			Name: "m", Description: strings.Repeat("x", pad), Data: &metricpb.Metric_Sum{Sum: &metricpb.Sum{
				AggregationTemporality: metricpb.AggregationTemporality_AGGREGATION_TEMPORALITY_DELTA, DataPoints: points}}}}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// valuesOf is the reverse of requestOf, for joined requests as well.
func valuesOf(t testing.TB, request []byte) (values []int64) {
	t.Helper()
	var r colmetricpb.ExportMetricsServiceRequest
	if err := proto.Unmarshal(request, &r); err != nil {
		t.Fatal(err)
	}
	for _, rm := range r.ResourceMetrics {
		for _, sm := range rm.ScopeMetrics {
			for _, m := range sm.Metrics {
				for _, p := range m.GetSum().DataPoints {
					values = append(values, p.GetAsInt())
				}
			}
		}
	}
	return values
}

// line is a receiver at the other end of a sender.
type line struct {
	t      *testing.T
	answer func(values []int64, size int) otlp.Answer

	mu    sync.Mutex
	calls []time.Time
	got   []int64 // accepted, in order
}

func (l *line) call(ctx context.Context, request []byte) otlp.Answer {
	if ctx.Err() != nil {
		return otlp.Answer{Verdict: otlp.Transient, Kind: "Canceled", Err: ctx.Err()}
	}
	values := valuesOf(l.t, request)
	a := l.answer(values, len(request))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls = append(l.calls, time.Now())
	if a.Verdict == otlp.Accepted {
		l.got = append(l.got, values...)
	}
	return a
}

// start runs a sender in the synctest bubble of the test.
func (l *line) start(box Outbox, log *logged) *sender {
	ctx, cancel := context.WithCancel(l.t.Context())
	s := newSender(box, newCounts(log.logger()), log.logger(), l.call)
	go s.run(ctx)
	l.t.Cleanup(func() { cancel(); <-s.done })
	return s
}

func (l *line) want(values ...int64) {
	l.t.Helper()
	if !slices.Equal(l.got, values) {
		l.t.Errorf("the receiver has %v, want %v", l.got, values)
	}
}

// settle lets time go by, and then everything that is due happen.
func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func refuse(v otlp.Verdict, kind string) otlp.Answer {
	a := otlp.Answer{Verdict: v, Kind: kind, Err: errors.New(kind)}
	return a
}

func fillBox(t testing.TB, box *memory, pad int, n int64) (all []int64) {
	for i := range n {
		box.add(1, requestOf(t, pad, i))
		all = append(all, i)
	}
	return all
}

func TestSenderHoldsInOrderUntilTheReceiverIsBack(t *testing.T) {
	for _, v := range []otlp.Verdict{otlp.Transient, otlp.Unreachable, otlp.Misconfigured} {
		t.Run(v.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var box memory
				var log logged
				back := time.Now().Add(30 * time.Minute)
				l := &line{t: t, answer: func([]int64, int) otlp.Answer {
					if time.Now().Before(back) {
						return refuse(v, "Away")
					}
					return otlp.Answer{}
				}}
				all := fillBox(t, &box, 0, 3)
				s := l.start(&box, &log)
				for i := int64(3); i < 180; i++ { // a cycle every 10 s, whatever the receiver does
					settle(10 * time.Second)
					box.set(func(m *memory) { m.add(1, requestOf(t, 0, i)) })
					s.kick()
					all = append(all, i)
				}
				if err := s.flush(t.Context()); err == nil {
					t.Error("flush says that all is delivered during the outage")
				}
				settle(5 * time.Minute)
				l.want(all...)
				if err := s.flush(t.Context()); err != nil {
					t.Errorf("flush after the outage: %v", err)
				}
				log.want(t, "cannot deliver metrics", 1)
				log.want(t, "metrics are delivered again", 1)
				// Backoff: not more than a call per few seconds, not less than
				// one per minute.
				if n := len(l.calls); n < 20 || n > 400 {
					t.Errorf("%d calls in 35 minutes", n)
				}
				longest := maxBackoff
				if v == otlp.Unreachable {
					longest = 15 * time.Second
				}
				for i := 1; i < len(l.calls); i++ {
					if gap := l.calls[i].Sub(l.calls[i-1]); gap > longest && l.calls[i].Before(back.Add(time.Minute)) {
						t.Errorf("%v between two tries", gap)
					}
				}
			})
		})
	}
}

func TestSenderWaitsAsLongAsItIsAsked(t *testing.T) {
	for asked, want := range map[time.Duration]time.Duration{
		2 * time.Minute:  2 * time.Minute,
		1000 * time.Hour: otlp.MaxAsked,
	} {
		synctest.Test(t, func(t *testing.T) {
			var box memory
			var log logged
			first := true
			l := &line{t: t, answer: func([]int64, int) otlp.Answer {
				if first {
					first = false
					a := refuse(otlp.Transient, "Unavailable")
					a.After = asked
					return a
				}
				return otlp.Answer{}
			}}
			fillBox(t, &box, 0, 1)
			l.start(&box, &log)
			settle(time.Hour)
			if len(l.calls) != 2 || l.calls[1].Sub(l.calls[0]) != want {
				t.Errorf("asked for %v: calls at %v", asked, l.calls)
			}
		})
	}
}

func TestSenderLogsChangesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		n := 0
		l := &line{t: t, answer: func([]int64, int) otlp.Answer {
			switch n++; {
			case n <= 10:
				return refuse(otlp.Unreachable, "connection")
			case n <= 20:
				return refuse(otlp.Misconfigured, "Unauthenticated")
			case n <= 30: // no news: this form is logged already
				return refuse(otlp.Unreachable, "connection")
			}
			return otlp.Answer{}
		}}
		fillBox(t, &box, 0, 1)
		s := l.start(&box, &log)
		settle(time.Hour)
		log.want(t, "cannot deliver metrics", 2)
		log.want(t, "level=ERROR", 1) // the setting that a person must mend
		log.want(t, "metrics are delivered again", 1)
		n = 5
		box.set(func(m *memory) { m.add(1, requestOf(t, 0, 2)) })
		s.kick()
		settle(time.Hour)
		log.want(t, "metrics are delivered again", 2)
		log.want(t, "err=connection", 2)
	})
}

// lateBox gets an entry just after Next has found none.
type lateBox struct {
	memory
	late func()
}

func (b *lateBox) Next(ctx context.Context, after int64, maxBytes int) ([]Entry, error) {
	entries, err := b.memory.Next(ctx, after, maxBytes)
	if len(entries) == 0 && b.late != nil {
		late := b.late
		b.late = nil
		late()
	}
	return entries, err
}

func TestFlushWaitsForAnEntryThatCameLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box lateBox
		var log logged
		var s *sender
		idle := true
		l := &line{t: t, answer: func([]int64, int) otlp.Answer {
			s.mu.Lock()
			defer s.mu.Unlock()
			idle = s.idle
			return otlp.Answer{}
		}}
		box.late = func() {
			box.set(func(m *memory) { m.add(1, requestOf(t, 0, 1)) })
			s.kick()
		}
		s = newSender(&box, newCounts(log.logger()), log.logger(), l.call)
		go s.run(t.Context())
		synctest.Wait()
		l.want(1)
		if idle {
			t.Error("flush would not have waited for the entry")
		}
		close(s.drain)
		<-s.done
	})
}

func TestSenderJoinsSmallRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		largest := 0
		l := &line{t: t, answer: func(_ []int64, size int) otlp.Answer {
			largest = max(largest, size)
			return otlp.Answer{}
		}}
		all := fillBox(t, &box, 100<<10, 100) // 10 MB
		l.start(&box, &log)
		synctest.Wait()
		l.want(all...)
		if len(l.calls) != 4 || largest > maxCall {
			t.Errorf("%d calls, the largest with %d bytes", len(l.calls), largest)
		}
	})
}

func TestSenderSplitsWhatIsTooLarge(t *testing.T) {
	for name, test := range map[string]struct {
		limit int
		fill  func(*testing.T, *memory) []int64
	}{
		"fewer entries in one call": {1 << 20, func(t *testing.T, box *memory) []int64 { return fillBox(t, box, 100<<10, 60) }},
		"entries one by one":        {40 << 10, func(t *testing.T, box *memory) []int64 { return fillBox(t, box, 30<<10, 20) }},
		"an entry by its points": {2000, func(t *testing.T, box *memory) (all []int64) {
			for i := range int64(1000) {
				all = append(all, i)
			}
			box.add(1000, requestOf(t, 0, all...))
			box.add(1, requestOf(t, 0, 1000))
			return append(all, 1000)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var box memory
				var log logged
				l := &line{t: t, answer: func(_ []int64, size int) otlp.Answer {
					if size > test.limit {
						return refuse(otlp.TooLarge, "ResourceExhausted")
					}
					return otlp.Answer{}
				}}
				all := test.fill(t, &box)
				s := l.start(&box, &log)
				synctest.Wait() // no waiting between the tries
				l.want(all...)
				if box.pending() > 0 || len(box.poison) > 0 {
					t.Errorf("%d entries are left, %d set aside", box.pending(), len(box.poison))
				}
				if sent := s.counts.sent.Load(); sent != int64(len(all)) {
					t.Errorf("counted %d points, want %d", sent, len(all))
				}
			})
		})
	}
}

// A piece that was accepted is not sent again when the next piece has to wait.
func TestSenderRemembersPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		n := 0
		l := &line{t: t, answer: func(values []int64, _ int) otlp.Answer {
			switch n++; {
			case len(values) > 2:
				return refuse(otlp.TooLarge, "HTTP 413")
			case n%3 == 0:
				return refuse(otlp.Transient, "HTTP 503")
			}
			return otlp.Answer{}
		}}
		box.add(8, requestOf(t, 0, 1, 2, 3, 4, 5, 6, 7, 8))
		l.start(&box, &log)
		settle(time.Hour)
		l.want(1, 2, 3, 4, 5, 6, 7, 8)
	})
}

func TestSenderSetsPoisonAside(t *testing.T) {
	for name, test := range map[string]struct {
		bad  []int64
		a    otlp.Answer
		want []int64
	}{
		"bad data":        {[]int64{2, 5}, otlp.Answer{Verdict: otlp.Suspect, Kind: "InvalidArgument"}, []int64{0, 1, 3, 4, 6, 7}},
		"one large point": {[]int64{2, 5}, otlp.Answer{Verdict: otlp.TooLarge, Kind: "HTTP 413"}, []int64{0, 1, 3, 4, 6, 7}},
		"two in a row":    {[]int64{2, 3}, otlp.Answer{Verdict: otlp.Suspect, Kind: "HTTP 400"}, []int64{0, 1, 5, 4, 6, 7}},
		"the first ones":  {[]int64{0, 1}, otlp.Answer{Verdict: otlp.Suspect, Kind: "HTTP 400"}, []int64{3, 2, 4, 5, 6, 7}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var box memory
				var log logged
				test.a.Err = errors.New("no")
				l := &line{t: t, answer: func(values []int64, _ int) otlp.Answer {
					if slices.ContainsFunc(values, func(v int64) bool { return slices.Contains(test.bad, v) }) {
						return test.a
					}
					return otlp.Answer{}
				}}
				fillBox(t, &box, 0, 8)
				s := l.start(&box, &log)
				settle(time.Hour)
				sorted := slices.Sorted(slices.Values(l.got))
				if want := slices.Sorted(slices.Values(test.want)); !slices.Equal(sorted, want) {
					t.Errorf("the receiver has %v, want %v once each", l.got, want)
				}
				if len(box.poison) != 2 || box.poison[test.bad[0]+1] == "" || box.poison[test.bad[1]+1] == "" || box.pending() > 0 {
					t.Errorf("set aside %v, %d left; want %v", box.poison, box.pending(), test.bad)
				}
				if s.counts.sent.Load() != 6 || s.counts.rejected.Load() != 2 {
					t.Errorf("counted %d sent, %d rejected", s.counts.sent.Load(), s.counts.rejected.Load())
				}
				log.want(t, "set aside in quarantine", 2)
				if err := s.flush(t.Context()); err != nil {
					t.Errorf("flush: %v", err)
				}
			})
		})
	}
}

// A Prometheus takes nothing that is much older than its newest point. The part of an
// outage that it does take must not be overtaken.
func TestSenderFindsTheFirstThatIsTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		newest := int64(0)
		l := &line{t: t, answer: func(values []int64, _ int) otlp.Answer {
			if values[0] < max(80, newest) {
				return refuse(otlp.Suspect, "HTTP 400")
			}
			newest = slices.Max(values)
			return otlp.Answer{}
		}}
		all := fillBox(t, &box, 100<<10, 120) // four times of what one call carries
		l.start(&box, &log)
		settle(time.Hour)
		l.want(all[80:]...)
		if len(box.poison) != 80 || box.pending() > 0 {
			t.Errorf("%d are set aside, %d left", len(box.poison), box.pending())
		}
	})
}

// The receiver recovers while another request is tried: the first one is good.
func TestSenderAsksAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		recovered := false
		l := &line{t: t, answer: func(values []int64, _ int) otlp.Answer {
			if recovered = recovered || slices.Equal(values, []int64{1}); recovered {
				return otlp.Answer{}
			}
			return refuse(otlp.Suspect, "HTTP 400")
		}}
		fillBox(t, &box, 0, 3)
		l.start(&box, &log)
		settle(time.Hour)
		l.want(1, 0, 2)
		if len(box.poison) > 0 || box.pending() > 0 {
			t.Errorf("set aside %v, %d left", box.poison, box.pending())
		}
	})
}

// What a receiver in trouble does not take is held, and does not hold up the others.
func TestSenderPassesWhatIsDoubtful(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		fixed := time.Now().Add(6 * time.Minute)
		l := &line{t: t, answer: func(values []int64, _ int) otlp.Answer {
			if time.Now().Before(fixed) && slices.ContainsFunc(values, func(v int64) bool { return v < 2 }) {
				return refuse(otlp.Doubtful, "HTTP 500")
			}
			return otlp.Answer{}
		}}
		fillBox(t, &box, 0, 6)
		l.start(&box, &log)
		settle(5 * time.Minute)
		if sorted := slices.Sorted(slices.Values(l.got)); !slices.Equal(sorted, []int64{2, 3, 4, 5}) {
			t.Errorf("the receiver has %v, want all but the first two", l.got)
		}
		if len(box.poison) > 0 || box.pending() != 6 {
			t.Errorf("set aside %v, %d left", box.poison, box.pending())
		}
		settle(5 * time.Minute)
		if len(l.got) != 6 || len(box.poison) > 0 || box.pending() != 0 {
			t.Errorf("the receiver has %v; set aside %v, %d left", l.got, box.poison, box.pending())
		}
	})
}

// Nothing is set aside before the receiver has accepted something else.
func TestSenderHoldsTheOnlyRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		l := &line{t: t, answer: func(values []int64, _ int) otlp.Answer {
			if slices.Contains(values, 0) {
				return refuse(otlp.Suspect, "HTTP 400")
			}
			return otlp.Answer{}
		}}
		fillBox(t, &box, 0, 1)
		s := l.start(&box, &log)
		settle(time.Hour)
		if len(box.poison) > 0 || box.pending() != 1 {
			t.Errorf("set aside %v, %d left", box.poison, box.pending())
		}
		box.set(func(m *memory) { m.add(1, requestOf(t, 0, 1)) })
		s.kick()
		settle(2 * time.Minute)
		l.want(1)
		if len(box.poison) != 1 || box.pending() != 0 {
			t.Errorf("set aside %v, %d left", box.poison, box.pending())
		}
	})
}

// A receiver that is broken for hours refuses all that it is sent. That is no
// reason to set all of it aside.
func TestSenderHoldsWhatABrokenReceiverRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		mended := time.Now().Add(6 * time.Hour)
		l := &line{t: t, answer: func([]int64, int) otlp.Answer {
			if time.Now().Before(mended) {
				return otlp.Answer{Verdict: otlp.Suspect, Kind: "HTTP 400", Err: errors.New("no")}
			}
			return otlp.Answer{}
		}}
		all := fillBox(t, &box, 0, 360)
		l.start(&box, &log)
		settle(6*time.Hour + 2*time.Minute)
		if len(box.poison) > 0 || box.pending() > 0 || len(l.got) != len(all) {
			t.Errorf("%d of 360 requests are set aside, %d left, %d arrived", len(box.poison), box.pending(), len(l.got))
		}
	})
}

// A piece that is refused costs its points, not those of the other pieces.
func TestSenderDeliversTheGoodPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		l := &line{t: t, answer: func(values []int64, _ int) otlp.Answer {
			if len(values) > 2 {
				return refuse(otlp.TooLarge, "ResourceExhausted")
			}
			if slices.Contains(values, 3) {
				return refuse(otlp.Suspect, "InvalidArgument")
			}
			return otlp.Answer{}
		}}
		box.add(8, requestOf(t, 0, 1, 2, 3, 4, 5, 6, 7, 8))
		box.add(1, requestOf(t, 0, 9))
		s := l.start(&box, &log)
		settle(time.Hour)
		l.want(1, 2, 5, 6, 4, 7, 8, 9)
		if s.counts.sent.Load() != 8 || s.counts.rejected.Load() != 1 || box.poison[1] == "" {
			t.Errorf("counted %d sent, %d rejected; set aside %v", s.counts.sent.Load(), s.counts.rejected.Load(), box.poison)
		}
	})
}

func TestSenderCountsPartialSuccessAndGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		l := &line{t: t, answer: func(values []int64, _ int) otlp.Answer { return otlp.Answer{Rejected: 1, Message: "too old"} }}
		s := l.start(&box, &log)
		for i := range int64(5) {
			box.set(func(m *memory) { m.add(3, requestOf(t, 0, i, i, i)) })
			s.kick()
			synctest.Wait()
		}
		if len(l.calls) != 5 || s.counts.sent.Load() != 10 || s.counts.rejected.Load() != 5 {
			t.Errorf("%d calls, counted %d sent, %d rejected", len(l.calls), s.counts.sent.Load(), s.counts.rejected.Load())
		}
		log.want(t, "partial success", 1)
		if want := (Partial{Points: 3, Rejected: 1, Message: "too old"}); box.partial != want {
			t.Errorf("the outbox knows of %+v, want %+v", box.partial, want)
		}
	})
}

// An answer that the outbox cannot record yet must not lead to a second delivery.
func TestSenderDoesNotRepeatWhatTheOutboxCannotRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		l := &line{t: t, answer: func([]int64, int) otlp.Answer { return otlp.Answer{} }}
		fillBox(t, &box, 0, 2)
		box.failDone = errors.New("disk I/O error")
		s := l.start(&box, &log)
		settle(10 * time.Minute)
		box.set(func(m *memory) { m.failDone, m.failNext = nil, errors.New("disk I/O error") })
		settle(10 * time.Minute)
		box.set(func(m *memory) { m.failNext = nil; m.add(1, requestOf(t, 0, 2)) })
		s.kick()
		settle(10 * time.Minute)
		l.want(0, 1, 2)
		log.want(t, "cannot record deliveries in the outbox", 1)
		log.want(t, "cannot read the outbox", 1)
		log.want(t, "the outbox works again", 1)
	})
}

// When a line is slow, less is put on it at once.
func TestSenderSendsLessOverASlowLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		l := &line{t: t, answer: func(_ []int64, size int) otlp.Answer {
			if size > 500<<10 {
				a := refuse(otlp.Transient, "DeadlineExceeded")
				a.Slow = true
				return a
			}
			return otlp.Answer{}
		}}
		all := fillBox(t, &box, 100<<10, 60)
		var large []int64 // one entry that the line does not carry in time
		for i := range int64(60_000) {
			large = append(large, 100+i)
		}
		box.add(len(large), requestOf(t, 0, large...))
		l.start(&box, &log)
		settle(time.Hour)
		l.want(append(all, large...)...)
	})
}

func TestSenderDrain(t *testing.T) {
	for name, test := range map[string]struct {
		back time.Duration // when the receiver answers again
		left int
	}{
		"receiver up":           {0, 0},
		"back before the end":   {3 * time.Second, 0},
		"not back before it is": {time.Hour, 3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var box memory
				var log logged
				back := time.Now().Add(30*time.Minute + test.back)
				l := &line{t: t, answer: func([]int64, int) otlp.Answer {
					if time.Now().Before(back) {
						return refuse(otlp.Transient, "Unavailable")
					}
					return otlp.Answer{}
				}}
				fillBox(t, &box, 0, 3)
				s := l.start(&box, &log)
				settle(30 * time.Minute) // deep in the longest delays
				begin := time.Now()
				close(s.drain)
				select {
				case <-s.done:
				case <-time.After(5 * time.Second):
				}
				synctest.Wait()
				if took := time.Since(begin); test.left == 0 && took > test.back+2*drainBackoff {
					t.Errorf("drained after %v", took)
				}
				if box.pending() != test.left {
					t.Errorf("%d entries are left, want %d", box.pending(), test.left)
				}
			})
		})
	}
}

// What was accepted in the last moment is not sent again after the next start.
func TestSenderRecordsTheLastAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		ctx, cancel := context.WithCancel(t.Context())
		l := &line{t: t, answer: func([]int64, int) otlp.Answer {
			cancel()
			return otlp.Answer{}
		}}
		fillBox(t, &box, 0, 2)
		s := newSender(&box, newCounts(log.logger()), log.logger(), l.call)
		go s.run(ctx)
		<-s.done
		if box.pending() != 0 {
			t.Errorf("%d accepted entries are left", box.pending())
		}
	})
}

func TestBackoffGrowsAndIsBounded(t *testing.T) {
	for _, v := range []otlp.Verdict{otlp.Transient, otlp.Unreachable, otlp.Misconfigured, otlp.Suspect} {
		for failures := 1; failures < 200; failures++ {
			a := otlp.Answer{Verdict: v}
			d := a.Backoff(failures, maxBackoff)
			most := maxBackoff
			if v == otlp.Unreachable {
				most = 15 * time.Second
			}
			if v != otlp.Misconfigured && failures < 7 {
				most = min(most, time.Second<<(failures-1))
			}
			if d < 100*time.Millisecond || d > most {
				t.Fatalf("%v after %d failures: %v, want up to %v", v, failures, d, most)
			}
		}
	}
}
