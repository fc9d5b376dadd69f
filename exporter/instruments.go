package exporter

import (
	"context"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/receiver"
)

// Instruments lists the instruments of Exporter.Register and Durable.Register.
func Instruments() []receiver.Instrument {
	return append(deliveryInstruments(), outboxInstruments()...)
}

// deliveryInstruments are in the order of Exporter.Register's values.
func deliveryInstruments() []receiver.Instrument {
	counter := func(name, description string) receiver.Instrument {
		return receiver.Instrument{Name: name, Kind: "observable counter", Unit: "{data_point}", Description: description, Attributes: []string{"host.name"}}
	}
	return []receiver.Instrument{
		counter("unitmeter.export.sent", "Data points that the OTLP receiver accepted."),
		counter("unitmeter.export.rejected", "Data points that the OTLP receiver refused for good: in partial successes and quarantined requests."),
		counter("unitmeter.export.dropped", "Invalid data points that were not sent: without a series in the sweep, or with an end before their start."),
	}
}

// outboxInstruments are in the order of outboxValues.
func outboxInstruments() []receiver.Instrument {
	const gauge, counter = "observable gauge", "observable counter"
	instrument := func(name, kind, unit, description string) receiver.Instrument {
		return receiver.Instrument{Name: name, Kind: kind, Unit: unit, Description: description, Attributes: []string{"host.name"}}
	}
	return []receiver.Instrument{
		instrument("unitmeter.outbox.bytes", gauge, "By", "Size on disk of the undelivered requests."),
		instrument("unitmeter.outbox.requests", gauge, "{request}", "Undelivered requests."),
		instrument("unitmeter.outbox.age", gauge, "s", "Age of the oldest undelivered request; 0 if there is none."),
		instrument("unitmeter.outbox.thinned", counter, "{data_point}", "Data points merged into later ones because the outbox was full. Totals stay exact."),
		instrument("unitmeter.outbox.dropped", counter, "{data_point}", "Data points dropped undelivered, because the outbox was full or they were too old."),
		instrument("unitmeter.state.replaced", counter, "{file}", "State files that were damaged, of another version or machine, or deleted, and replaced by a new one."),
	}
}

func outboxValues(s store.Stats) []int64 {
	age := int64(0)
	if !s.OldestTime.IsZero() {
		age = max(int64(time.Since(s.OldestTime)/time.Second), 0)
	}
	size := s.OutboxBytes
	if s.OutboxEntries == 0 {
		size = 0 // what there is helps to compress the requests to come
	}
	return []int64{size, s.OutboxEntries, age, s.ThinnedPoints, s.DroppedPoints, s.Replaced}
}

// Register makes the exporter's own instruments on the meter (see Health). Their
// points carry host.name as those of the units do.
func (e *Exporter) Register(meter metric.Meter, hostName string) error {
	return register(meter, hostName, deliveryInstruments(), func() []int64 {
		return []int64{e.counts.sent.Load(), e.counts.rejected.Load(), e.counts.dropped.Load()}
	})
}

// Register makes the instruments unitmeter.outbox.* and unitmeter.state.* on the meter. Their points
// carry host.name as those of the units do.
func (d *Durable) Register(meter metric.Meter, hostName string) error {
	return register(meter, hostName, outboxInstruments(), func() []int64 { return outboxValues(d.store.Stats()) })
}

// register makes instruments whose values are read together, once for each
// collection. values has one for each instrument, in the same order.
func register(meter metric.Meter, hostName string, instruments []receiver.Instrument, values func() []int64) error {
	host := metric.WithAttributes(attribute.String("host.name", hostName))
	made := make([]metric.Int64Observable, len(instruments))
	all := make([]metric.Observable, len(instruments))
	for i, instrument := range instruments {
		var err error
		if made[i], err = instrument.Int64(meter); err != nil {
			return err
		}
		all[i] = made[i]
	}
	_, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		for i, value := range values() {
			o.ObserveInt64(made[i], value, host)
		}
		return nil
	}, all...)
	if err != nil {
		return fmt.Errorf("register the instruments beside %s: %w", instruments[0].Name, err)
	}
	return nil
}
