package receiver

import (
	"context"
	"fmt"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// Names of the instruments that have points for each series. The first two follow the pattern of the semantic
// conventions' process.network.io and system.network.packet.count.
const (
	IOName          = "systemd.unit.network.io"
	PacketCountName = "systemd.unit.network.packet.count"
	// WireIOName and WirePacketCountName are the same after segmentation.
	WireIOName          = "systemd.unit.network.wire.io"
	WirePacketCountName = "systemd.unit.network.wire.packet.count"
	// UnattributedName is the instrument for what a top-level slice counted and no
	// series has.
	UnattributedName = "unitmeter.unattributed"
)

// OfSeries reports whether an instrument has points for each series.
func OfSeries(name string) bool {
	switch name {
	case IOName, PacketCountName, WireIOName, WirePacketCountName, UnattributedName:
		return true
	}
	return false
}

// Instrument describes one instrument of the agent, for its documentation.
type Instrument struct {
	Name, Kind, Unit, Description string
	Attributes                    []string
}

// Int64 makes the instrument on meter. The caller observes it in a callback.
func (i Instrument) Int64(meter metric.Meter) (made metric.Int64Observable, err error) {
	if i.Kind == "observable gauge" {
		made, err = meter.Int64ObservableGauge(i.Name, metric.WithUnit(i.Unit), metric.WithDescription(i.Description))
	} else {
		made, err = meter.Int64ObservableCounter(i.Name, metric.WithUnit(i.Unit), metric.WithDescription(i.Description))
	}
	if err != nil {
		return nil, fmt.Errorf("make instrument %s: %w", i.Name, err)
	}
	return made, nil
}

// Instruments lists the instruments that Register makes.
func Instruments() []Instrument {
	unit := []string{"systemd.unit.name", "network.io.direction", "host.name"}
	host := []string{"host.name"}
	return []Instrument{
		{IOName, "observable counter", "By", "Bytes that a systemd unit received or sent, IP headers included. Forwarded packets, AF_PACKET sockets and the kernel's own sockets are not counted.", unit},
		{PacketCountName, "observable counter", "{packet}", "IP packets that a systemd unit received or sent. A packet that segmentation offload splits later counts once, so this is not the number on the wire.", unit},
		{WireIOName, "observable counter", "By", "Bytes after segmentation offload: each segment with its IP and TCP or UDP headers, without those of the link. Opt-in: UNITMETER_WIRE=yes, with UNITMETER_SOURCE=ebpf.", unit},
		{WirePacketCountName, "observable counter", "{packet}", "IP packets after segmentation offload. Opt-in: UNITMETER_WIRE=yes, with UNITMETER_SOURCE=ebpf.", unit},
		{UnattributedName, "observable counter", "By", "Bytes of a top-level slice that are in no series: from units that are not metered, or that ended before they could be read. The slice needs IP accounting. With UNITMETER_SOURCE=ebpf: from cgroups that did not fit into the maps or have no name (-.slice), and from processes directly in a slice.", []string{"systemd.unit.slice", "network.io.direction", "host.name"}},
		{"unitmeter.units", "observable gauge", "{unit}", "Loaded units of the metered types, by state of their IP accounting: on, off (IPAccounting=no), no_data (nothing to count), lost (systemd lost the counters), failed (invalid answer), unknown (not read yet).", append([]string{"unitmeter.accounting.state"}, host...)},
		{"unitmeter.series", "observable gauge", "{series}", "Series in the ledger, including those whose unit no longer runs.", host},
		{"unitmeter.sweep.duration", "observable gauge", "s", "Duration of the last reading of all units.", host},
		{"unitmeter.sweep.partial", "observable counter", "{sweep}", "Readings of all units that a deadline or an error cut short.", host},
		{"unitmeter.dbus.errors", "observable counter", "{error}", "D-Bus calls that failed or had an invalid reply.", host},
		{"unitmeter.dbus.signals.refused", "observable counter", "{signal}", "D-Bus signals that were dropped: not sent by systemd, or longer than any of its signals.", host},
		{"unitmeter.dbus.signals.dropped", "observable counter", "{signal}", "D-Bus signals of systemd that were dropped because too many came at once. The units are listed again instead.", host},
		{"unitmeter.dbus.reconnects", "observable counter", "{attempt}", "Attempts to connect to systemd again.", host},
		{"unitmeter.systemd.reloads", "observable counter", "{reload}", "Reloads and re-executions of systemd. At each, systemd fails to count some traffic.", append([]string{"unitmeter.reload.type"}, host...)},
		{"unitmeter.systemd.reload.duration", "observable counter", "s", "Duration of all reloads and re-executions of systemd, generators included. systemd counts no traffic meanwhile.", host},
		{"unitmeter.counter.resets", "observable counter", "{reset}", "Times that a unit's counters fell within one run.", host},
		{"unitmeter.runs.missed", "observable counter", "{run}", "Runs of accounted units that ended with neither a last reading nor a record of their end in the journal. Their traffic may be in no series.", host},
		{"unitmeter.journal.errors", "observable counter", "{record}", "Invalid stop records in the journal.", host},
		{"unitmeter.units.skipped", "observable counter", "{unit}", "Units skipped because their name is invalid.", host},
	}
}

// Register makes the instruments on meter and the one callback that observes
// them all: each collection is one sweep, or the sweep given to OfSweep. The callback
// never returns an error, since the SDK would drop the whole collection.
func (r *Receiver) Register(meter metric.Meter) error {
	counters, seconds := map[string]metric.Int64Observable{}, map[string]metric.Float64Observable{}
	var all []metric.Observable
	for _, i := range Instruments() {
		var err error
		switch {
		case i.Unit == "s" && i.Kind == "observable gauge":
			seconds[i.Name], err = meter.Float64ObservableGauge(i.Name, metric.WithUnit(i.Unit), metric.WithDescription(i.Description))
			all = append(all, seconds[i.Name])
		case i.Unit == "s":
			seconds[i.Name], err = meter.Float64ObservableCounter(i.Name, metric.WithUnit(i.Unit), metric.WithDescription(i.Description))
			all = append(all, seconds[i.Name])
		default:
			counters[i.Name], err = i.Int64(meter)
			all = append(all, counters[i.Name])
		}
		if err != nil {
			return err
		}
	}
	// Made once: the SDK makes a set of attributes again for each call with some.
	with := func(attrs ...attribute.KeyValue) []metric.ObserveOption {
		set := attribute.NewSet(append(attrs, attribute.String("host.name", r.cfg.HostName))...)
		return []metric.ObserveOption{metric.WithAttributeSet(set)}
	}
	plain := with()
	reload, reexec := with(attribute.String("unitmeter.reload.type", "reload")), with(attribute.String("unitmeter.reload.type", "reexec"))
	var states [][]metric.ObserveOption
	for _, name := range systemd.AccountingStates() {
		states = append(states, with(attribute.String("unitmeter.accounting.state", name)))
	}

	_, err := meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		sweep, given := ctx.Value(sweepKey{}).(*Sweep)
		if !given {
			sweep = r.Sweep(ctx)
		}
		for s, attrs := range sweep.All() {
			if s.Observed && attrs.Bytes != "" {
				o.ObserveInt64(counters[attrs.Bytes], int64(s.Total.Received.Bytes), attrs.receive...)
				o.ObserveInt64(counters[attrs.Bytes], int64(s.Total.Sent.Bytes), attrs.transmit...)
			}
			if s.Observed && attrs.Packets != "" {
				o.ObserveInt64(counters[attrs.Packets], int64(s.Total.Received.Packets), attrs.receive...)
				o.ObserveInt64(counters[attrs.Packets], int64(s.Total.Sent.Packets), attrs.transmit...)
			}
		}
		o.ObserveFloat64(seconds["unitmeter.sweep.duration"], sweep.Duration.Seconds(), plain...)
		count := func(name string, n int64) { o.ObserveInt64(counters[name], n, plain...) }
		r.mu.Lock()
		partial, resets, missed, series := r.partial, r.ledger.Resets(), r.ledger.Missed(), 0
		for l := range r.ledgers() {
			series += l.Size()
		}
		r.mu.Unlock()
		count("unitmeter.sweep.partial", partial)
		count("unitmeter.series", int64(series))
		if r.systemd == nil {
			return nil
		}
		count("unitmeter.counter.resets", resets)
		count("unitmeter.runs.missed", missed)
		bad := int64(0)
		if r.journal != nil {
			bad = r.journal.Bad()
		}
		count("unitmeter.journal.errors", bad)
		h := r.systemd.Health()
		count("unitmeter.dbus.errors", h.Errors)
		count("unitmeter.dbus.signals.refused", h.Refused)
		count("unitmeter.dbus.signals.dropped", h.Dropped)
		count("unitmeter.dbus.reconnects", h.Reconnects)
		count("unitmeter.units.skipped", h.BadNames)
		for i, n := range r.systemd.States() {
			o.ObserveInt64(counters["unitmeter.units"], n, states[i]...)
		}
		o.ObserveFloat64(seconds["unitmeter.systemd.reload.duration"], h.Reloading.Seconds(), plain...)
		o.ObserveInt64(counters["unitmeter.systemd.reloads"], h.Reloads, reload...)
		o.ObserveInt64(counters["unitmeter.systemd.reloads"], h.Reexecs, reexec...)
		return nil
	}, all...)
	if err != nil {
		return fmt.Errorf("register the sweep: %w", err)
	}
	return nil
}
