package config

import (
	"slices"

	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/receiver"
)

// Receiver returns the settings of the receiver.
func (c Config) Receiver() receiver.Config {
	return receiver.Config{
		Bus:          c.Bus,
		SystemBus:    c.SystemBusAddress,
		Include:      c.Include,
		Exclude:      c.Exclude,
		Types:        c.UnitTypes,
		Fold:         c.Fold,
		MaxSeries:    c.MaxUnits,
		UnitType:     slices.Contains(c.Attributes, "systemd.unit.type"),
		UnitSlice:    slices.Contains(c.Attributes, "systemd.unit.slice"),
		StopRecords:  c.StopRecords,
		SweepTimeout: c.SweepTimeout,
		HostName:     c.ResourceAttributes["host.name"],
	}
}

// Exporter returns the settings of the connection to the Collector.
func (o OTLP) Exporter() exporter.Config {
	return exporter.Config{
		Protocol: o.Protocol, Endpoint: o.Endpoint, Insecure: o.Insecure, TLS: o.TLS,
		Headers: o.Headers, Gzip: o.Compression == "gzip", Timeout: o.Timeout, Temporality: o.Temporality,
	}
}
