package receiver

import (
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// kernel is what lies under systemd: packets arrive between any two reads, and
// a packet is counted in two steps, first the packet, then its bytes. In truth
// nanoseconds lie between the two; here, any number of reads of one sweep. But
// what is counted by half in one sweep is counted whole in the next.
type kernel struct {
	mu     sync.Mutex
	random *rand.Rand
	rate   float64 // probability of an event before each read
	units  map[string]*kernelUnit
	gets   map[string]int // counters read, by property
}

type kernelUnit struct {
	Counters
	last Counters // total after the last sweep
	// Bytes of packets that are counted already.
	ingressPending, egressPending uint64
}

// step lets one thing happen to a unit.
func (k *kernel) step(u *kernelUnit) {
	switch k.random.IntN(3) {
	case 0: // a packet comes
		u.IngressPackets++
		u.ingressPending += 40 + k.random.Uint64N(1460)
	case 1: // a packet goes
		u.EgressPackets++
		u.egressPending += 40 + k.random.Uint64N(1460)
	}
	if k.random.IntN(2) == 0 {
		u.settle()
	}
}

// settle counts the bytes of all packets.
func (k *kernel) settle() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, u := range k.units {
		u.settle()
	}
}

func (u *kernelUnit) settle() {
	u.IngressBytes += u.ingressPending
	u.EgressBytes += u.egressPending
	u.ingressPending, u.egressPending = 0, 0
}

// get is the fake's hook.
func (k *kernel) get(path dbus.ObjectPath, _, property string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	u, ok := k.units[strings.TrimPrefix(string(path), unitPathPrefix)]
	if !ok {
		return dbus.Variant{}, nil, 0, false
	}
	if k.random.Float64() < k.rate {
		k.step(u)
	}
	var v uint64
	switch property {
	case "IPIngressBytes":
		v = u.IngressBytes
	case "IPIngressPackets":
		v = u.IngressPackets
	case "IPEgressBytes":
		v = u.EgressBytes
	case "IPEgressPackets":
		v = u.EgressPackets
	default:
		return dbus.Variant{}, nil, 0, false
	}
	k.gets[property]++
	return dbus.MakeVariant(v), nil, 0, true
}

// taken returns the number of reads since the last call.
func (k *kernel) taken() (packets, bytes int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	packets = k.gets["IPIngressPackets"] + k.gets["IPEgressPackets"]
	bytes = k.gets["IPIngressBytes"] + k.gets["IPEgressBytes"]
	clear(k.gets)
	return packets, bytes
}

// TestIdleRule: a unit whose packet counters stand still costs two reads, not
// four, one with traffic in one direction costs three, and however packets fall
// between the single reads, no byte is missed.
func TestIdleRule(t *testing.T) {
	const units = 5
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	k := &kernel{random: rand.New(rand.NewPCG(seed, 0)), units: map[string]*kernelUnit{}, gets: map[string]int{}}
	fake := systemdtest.StartFake(t)
	names := map[string]string{}
	for i := range units {
		name := string(rune('a'+i)) + ".service"
		names[name] = id(i + 1)
		k.units[id(i+1)] = &kernelUnit{}
		fake.SetUnit(accounted(name, i+1, Counters{}))
	}
	fake.OnGet(k.get)
	r, _ := start(t, Config{Bus: fake.Address()})
	for round := range 60 {
		k.mu.Lock()
		k.rate = []float64{0.01, 0.1, 0.5, 1}[k.random.IntN(4)]
		sweeps := 1 + k.random.IntN(5)
		k.mu.Unlock()
		for range sweeps {
			k.settle()
			s := r.Sweep(t.Context())
			for name, invocation := range names {
				got, ok := s.seriesOf(name)
				if last := k.units[invocation].last; !ok || countersOf(got.Total).Max(countersOf(last)) != countersOf(got.Total) {
					t.Fatalf("round %d: %s fell from %+v to %+v", round, name, k.units[invocation].last, got.Total)
				}
				k.units[invocation].last = got.Total
			}
		}
		// Quiet: the next sweep has it all.
		k.mu.Lock()
		k.rate = 0
		k.mu.Unlock()
		k.settle()
		s := r.Sweep(t.Context())
		for name, invocation := range names {
			want(t, s, name, k.units[invocation].Counters)
		}
		r.Sweep(t.Context()) // finds that nothing moves any more
		k.taken()
		for range 3 {
			r.Sweep(t.Context())
			if packets, bytes := k.taken(); packets != 2*units || bytes != 0 {
				t.Fatalf("round %d: %d idle units cost %d reads of packets and %d of bytes", round, units, packets, bytes)
			}
		}
		for range 2 { // a sender is found out by the first sweep
			k.mu.Lock()
			for _, u := range k.units {
				u.EgressPackets, u.EgressBytes = u.EgressPackets+1, u.EgressBytes+40
			}
			k.mu.Unlock()
			s = r.Sweep(t.Context())
			for name, invocation := range names {
				want(t, s, name, k.units[invocation].Counters)
			}
			if packets, bytes := k.taken(); packets != 2*units || bytes != units {
				t.Fatalf("round %d: %d units that send cost %d reads of packets and %d of bytes", round, units, packets, bytes)
			}
		}
	}
	if h := r.systemd.Health(); h != (systemd.Health{}) {
		t.Errorf("something went wrong: %+v", h)
	}
}

// TestIdleRuleEndsWithTheRun: a new run with the same packet counts as the old
// one is read whole.
func TestIdleRuleEndsWithTheRun(t *testing.T) {
	for name, signal := range map[string]bool{"with a signal": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			fake := systemdtest.StartFake(t)
			fake.SetUnit(accounted("a.service", 1, counted(100, 2, 200, 3)))
			r, _ := start(t, Config{Bus: fake.Address()})
			for range 4 {
				want(t, r.Sweep(t.Context()), "a.service", counted(100, 2, 200, 3))
			}
			fake.SetUnit(accounted("a.service", 2, counted(1000, 2, 2000, 3)))
			if signal {
				fake.EmitPropertiesChanged("a.service")
				systemdtest.Eventually(t, "the signal is noticed", func() bool { return r.unitNamed("a.service").Invocation == id(2) })
			}
			want(t, r.Sweep(t.Context()), "a.service", counted(1100, 4, 2200, 6))
		})
	}
}

// TestIdleRuleEndsWithAReset: counters that began again within a run are read
// whole, though one direction has just as many packets as before.
func TestIdleRuleEndsWithAReset(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, counted(100, 2, 200, 3)))
	r, _ := start(t, Config{Bus: fake.Address()})
	for range 4 {
		want(t, r.Sweep(t.Context()), "a.service", counted(100, 2, 200, 3))
	}
	fake.SetUnit(accounted("a.service", 1, counted(50, 1, 900, 3)))
	want(t, r.Sweep(t.Context()), "a.service", counted(150, 3, 1100, 6))
}
