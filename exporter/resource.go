package exporter

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strings"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/resource"
)

// Resource describes this agent on this host: service.name (unitmeter),
// service.version, service.instance.id, host.name, host.id, os.type and
// telemetry.sdk.*. What OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say wins.
//
// service.instance.id is a UUIDv5 of the machine id, as the semantic conventions
// recommend ("service.instance.id" in resource/service): a random one, the SDK's
// default, would begin every series anew at each start. Without a machine id
// there is no host.id, and the instance id is made from the host name.
//
// Nothing in it changes with the process or the kernel, for the same reason. It
// fails if one of the two variables cannot be read.
func Resource(ctx context.Context, version string) (*resource.Resource, error) {
	host, err := os.Hostname()
	if err != nil {
		host = ""
	}
	return describe(ctx, version, host, machineID("/etc/machine-id", "/var/lib/dbus/machine-id"))
}

func describe(ctx context.Context, version, host, machine string) (*resource.Resource, error) {
	attrs := []attribute.KeyValue{
		attribute.String("service.name", "unitmeter"),
		attribute.String("service.version", version),
		attribute.String("os.type", "linux"),
	}
	if host != "" {
		attrs = append(attrs, attribute.String("host.name", host))
	}
	id := host
	if machine != "" {
		attrs = append(attrs, attribute.String("host.id", machine))
		id = machine
	}
	// The namespace is the one that the semantic conventions give for this use.
	namespace := uuid.UUID{0x4d, 0x63, 0x00, 0x9a, 0x8d, 0x0f, 0x11, 0xee, 0xaa, 0xd7, 0x4c, 0x79, 0x6e, 0xd8, 0xe3, 0x20}
	if id != "" {
		attrs = append(attrs, attribute.String("service.instance.id", uuid.NewSHA1(namespace, []byte(id)).String()))
	}
	res, err := resource.New(ctx,
		resource.WithAttributes(attrs...),
		resource.WithTelemetrySDK(),
		resource.WithFromEnv(), // last, so that it wins
	)
	if err != nil {
		return nil, fmt.Errorf("read OTEL_RESOURCE_ATTRIBUTES=%q: %w; write it as key=value,key=value with percent encoding",
			os.Getenv("OTEL_RESOURCE_ATTRIBUTES"), err)
	}
	return res, nil
}

// Machine tells this machine from others, also after its disk has been copied:
// store.Config.Machine. It is a hash, as machine-id(5) asks for; "" if the machine
// id is not known.
func Machine() string { return hashed(machineID("/etc/machine-id", "/var/lib/dbus/machine-id")) }

func hashed(machine string) string {
	if machine == "" {
		return ""
	}
	mac := hmac.New(sha256.New, []byte(machine))
	mac.Write([]byte("unitmeter state"))
	return hex.EncodeToString(mac.Sum(nil)[:16])
}

// machineID returns the first machine id (machine-id(5)) in the files; "" if
// there is none. During the first boot the file may say "uninitialized".
func machineID(files ...string) string {
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		id := strings.TrimSpace(string(text))
		if raw, err := hex.DecodeString(id); err == nil && len(raw) == 16 {
			return id
		}
	}
	return ""
}
