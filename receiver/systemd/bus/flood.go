package bus

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	// signalRate and signalBurst bound the signals that are delivered, per second and
	// at once. Any user can have systemd send some: it announces each unit that
	// somebody asks for, also one that does not exist. Starting a unit takes about ten.
	signalRate  = 2000
	signalBurst = 10000
	// maxQueued is how many signals may wait to be received, and maxVital how many of
	// the rare ones beside them.
	maxQueued = 1024
	maxVital  = 64
)

// flood bounds the signals of one connection. Over the bound all are dropped, until
// resume.
type flood struct {
	queue   chan *dbus.Signal
	began   chan struct{} // has a token when signals are dropped
	paused  atomic.Bool
	dropped atomic.Int64

	// Used by the goroutine that reads the connection only.
	left float64 // signals that may still come now
	last time.Time

	mu    sync.Mutex
	ended bool // queue is closed
}

func newFlood() *flood {
	return &flood{queue: make(chan *dbus.Signal, maxQueued+maxVital), began: make(chan struct{}, 1), left: signalBurst}
}

// vital reports whether a signal decides which others are genuine. There are few.
func (s Signal) vital() bool {
	return string(s.Member) == "Reloading" || string(s.Member) == "NameOwnerChanged"
}

// admit reports whether a signal that came at a moment is to be delivered.
func (f *flood) admit(s Signal, now time.Time) bool {
	if s.vital() {
		return true
	}
	f.left = min(signalBurst, f.left+now.Sub(f.last).Seconds()*signalRate)
	f.last = now
	if !f.paused.Load() && f.left >= 1 && len(f.queue) < maxQueued {
		f.left--
		return true
	}
	f.drop()
	return false
}

func (f *flood) drop() {
	f.dropped.Add(1)
	if f.paused.CompareAndSwap(false, true) {
		select {
		case f.began <- struct{}{}:
		default:
		}
	}
}

// DeliverSignal implements dbus.SignalHandler.
func (f *flood) DeliverSignal(_, _ string, signal *dbus.Signal) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return
	}
	select {
	case f.queue <- signal:
	default:
		f.drop()
	}
}

// Terminate implements dbus.Terminator.
func (f *flood) Terminate() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ended {
		f.ended = true
		close(f.queue)
	}
}
