package exporter

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/unitmeter/unitmeter/exporter/otlp"
)

// said is one answer as it is on the wire, sorted by the real client.
type said struct {
	text  string
	a     otlp.Answer
	taken bool // the receiver has the request, and its answer is lost
}

// allSaid are the answers of receivers, and of what stands before them.
var allSaid = func() (all []said) {
	web := func(code int, contentType, body, retryAfter string) {
		resp := &http.Response{StatusCode: code, Status: fmt.Sprint(code, " ", http.StatusText(code)), Header: http.Header{"Content-Type": {contentType}, "Retry-After": {retryAfter}}}
		all = append(all, said{fmt.Sprintf("HTTP %d %q", code, body), otlp.HTTPAnswer(resp, []byte(body), time.Time{}), false})
	}
	for _, code := range []int{301, 302, 307, 308, 400, 401, 402, 403, 404, 405, 406, 407, 408, 409, 410, 411, 413, 415, 421, 422, 423, 424, 425, 426, 428, 429, 431, 451, 464, 499,
		500, 501, 502, 503, 504, 505, 507, 508, 511, 520, 521, 522, 523, 524, 525, 526, 527, 530, 599} {
		web(code, "text/plain", "no", "")
		web(code, "text/html", "<html><title>No</title></html>", "")
	}
	web(200, "text/html; charset=utf-8", "<!doctype html><title>Log in</title>", "")
	web(200, "application/json", `{"partialSuccess":{"rejectedDataPoints":"1","errorMessage":"old"}}`, "")
	web(429, "text/plain", "slow down", "7")
	web(503, "text/plain", "later", "Mon, 23 Nov 2099 12:00:00 GMT")
	web(400, "text/plain", "out of bounds", "")
	web(400, "text/plain", "timestamp is too far in the future", "")
	web(400, "text/plain", "http: request body too large", "")
	web(400, "text/plain", "Client sent an HTTP request to an HTTPS server.\n", "")
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		for _, text := range []string{"no", "received message larger than max (5242880 vs. 4194304)", `unexpected HTTP status code received from server: 405 (Method Not Allowed)`} {
			all = append(all, said{fmt.Sprint(code, " ", text), otlp.GRPCAnswer(status.New(code, text)), false})
		}
	}
	lost := func(text string, a otlp.Answer) {
		a.Err = errors.New(text)
		all = append(all, said{text, a, false}, said{text + ", and it has the request", a, true})
	}
	lost("reset", otlp.Answer{Verdict: otlp.Unreachable, Kind: "connection"})
	lost("timeout", otlp.Answer{Verdict: otlp.Transient, Kind: "DeadlineExceeded", Slow: true})
	return append(all, said{text: "accepts"}, said{text: "partial success", a: otlp.Answer{Rejected: 1, Message: "too old"}})
}()

// manners are what a receiver is like beside its answers.
type manners struct {
	limit    int   // a call may have so many points; 0 is no limit
	poison   int64 // of so many values one is refused, whenever it comes; 0 is none
	inOrder  bool  // it refuses what is older than the newest of the same series
	entries  int64 // requests that are committed
	series   int64 // values of each
	together bool  // all are committed before the first call
}

func (m manners) bad(v int64) bool { return m.poison > 0 && v%m.poison == 1 }

// heldAgainst checks, for any answers that end in acceptance, that each value
// arrives once and in order, except what was refused as bad data while others were
// accepted.
func heldAgainst(t *testing.T, script []said, m manners) {
	synctest.Test(t, func(t *testing.T) {
		var box memory
		var log logged
		var history []string
		got := map[int64]int{}      // how often a value was taken
		resent := map[int64]bool{}  // its answer was lost
		refused := map[int64]bool{} // of a value: the last answer about its entry alone is dubious
		doubted := map[int64]bool{} // of an entry: it was refused as bad data
		proven := map[int64]bool{}  // and then something else was accepted
		newest := map[int64]int64{} // by series
		next := 0
		entry := func(v int64) int64 { return v / m.series }
		l := &line{t: t}
		l.answer = func(values []int64, _ int) otlp.Answer {
			s := said{text: "accepts"}
			if next < len(script) {
				s = script[next]
				next++
			}
			bad, old := false, false
			for _, v := range values {
				bad = bad || m.bad(v)
				old = old || m.inOrder && entry(v) < newest[v%m.series]
			}
			accepts := s.a.Verdict == otlp.Accepted
			switch {
			case m.limit > 0 && len(values) > m.limit:
				s = said{text: "too large", a: otlp.HTTPAnswer(&http.Response{StatusCode: 413}, nil, time.Time{})}
			case accepts && bad, accepts && old:
				s = said{text: "bad", a: otlp.HTTPAnswer(&http.Response{StatusCode: 400}, []byte("out of order sample"), time.Time{})}
			}
			history = append(history, fmt.Sprintf("%v: %s", values, s.text))
			first := entry(values[0])
			alone := entry(values[len(values)-1]) == first
			if s.a.Verdict == otlp.Accepted || s.taken {
				for _, v := range values {
					if got[v]++; got[v] > 1 && !resent[v] {
						t.Errorf("%d arrives again", v)
					}
					resent[v] = s.taken
					newest[v%m.series] = max(newest[v%m.series], entry(v))
					// What has not arrived may only be what was just refused.
					for older := int64(0); older < entry(v) && got[v] == 1; older++ {
						if w := older*m.series + v%m.series; got[w] == 0 && !m.bad(w) && !refused[w] && box.poison[older+1] == "" {
							t.Errorf("%d overtakes %d\n%s", v, w, strings.Join(history[max(0, len(history)-30):], "\n"))
						}
					}
				}
			}
			if s.a.Verdict == otlp.Accepted {
				for e := range doubted {
					proven[e] = true
				}
			}
			if alone {
				for _, v := range values {
					refused[v] = s.a.Verdict == otlp.Suspect || s.a.Verdict == otlp.Doubtful || s.a.Verdict == otlp.TooLarge
				}
				doubted[first] = doubted[first] || s.a.Verdict == otlp.Suspect || s.a.Verdict == otlp.TooLarge
			}
			return s.a
		}
		commit := func(i int64) {
			var values []int64
			for j := range m.series {
				if v := i*m.series + j; i < m.entries || !m.bad(v) {
					values = append(values, v)
				}
			}
			if len(values) > 0 {
				box.set(func(b *memory) { b.add(len(values), requestOf(t, 0, values...)) })
			}
		}
		s := newSender(&box, newCounts(log.logger()), log.logger(), l.call)
		for i := range m.entries {
			if m.together {
				commit(i)
			}
		}
		go s.run(t.Context())
		for i := range m.entries {
			if !m.together {
				commit(i)
				s.kick()
				settle(time.Minute)
			}
		}
		synctest.Wait()
		for wait := 0; box.pending() > 0 && (next < len(script) || wait < 3); wait++ {
			settle(10 * time.Minute)
		}
		// Without another request, the last one cannot be told to be bad.
		for i := m.entries; box.pending() > 0 && i < m.entries+20; i++ {
			commit(i)
			s.kick()
			settle(10 * time.Minute)
		}
		close(s.drain)
		settle(time.Hour)
		if box.pending() > 0 {
			t.Errorf("%d requests are left", box.pending())
		}
		for v := range m.entries * m.series {
			if got[v] > 0 {
				continue
			}
			if id := entry(v) + 1; box.poison[id] == "" {
				t.Errorf("%d is lost", v)
			} else if !proven[id-1] {
				t.Errorf("%d is set aside, and nothing else was accepted", v)
			}
		}
		if t.Failed() {
			t.Logf("%+v\n%s", m, strings.Join(history[max(0, len(history)-150):], "\n"))
		}
	})
}

// mannersOf makes manners of a number.
func mannersOf(n uint64) manners {
	pick := func(of ...int64) int64 {
		v := of[n%uint64(len(of))]
		n /= uint64(len(of))
		return v
	}
	return manners{
		limit: int(pick(0, 0, 1, 2, 5)), poison: pick(0, 0, 3, 7, 11), inOrder: pick(0, 1) == 1,
		entries: pick(1, 2, 5, 12, 40), series: pick(1, 2, 3, 8), together: pick(0, 1) == 1,
	}
}

// Any sequence of answers that ends in acceptance loses nothing.
func TestNoAnswerCostsAByte(t *testing.T) {
	for i := range 3000 {
		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 1))
		m := mannersOf(r.Uint64())
		favourites := make([]said, 1+r.IntN(5)) // answers come in spells
		for i := range favourites {
			favourites[i] = allSaid[r.IntN(len(allSaid))]
		}
		var script []said
		for range r.IntN(60) {
			if r.IntN(4) == 0 {
				script = append(script, allSaid[r.IntN(len(allSaid))])
			} else {
				script = append(script, favourites[r.IntN(len(favourites))])
			}
		}
		if heldAgainst(t, script, m); t.Failed() {
			t.Fatalf("sequence %d with the seed %d", i, seed)
		}
	}
}

func FuzzAnswers(f *testing.F) {
	f.Add(uint64(0), []byte{8, 8, 8, 8})
	f.Fuzz(func(t *testing.T, like uint64, answers []byte) {
		var script []said
		for _, b := range slices.Clip(answers[:min(len(answers), 200)]) {
			script = append(script, allSaid[int(b)%len(allSaid)])
		}
		heldAgainst(t, script, mannersOf(like))
	})
}
