package exporter

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// otlpEnv is the part of OTEL_EXPORTER_OTLP_* that the exporter must know
// itself. The official exporters read the same variables; what they only log
// and then ignore (a certificate file that is missing or broken) is an error
// here, because they would go on without it.
type otlpEnv struct {
	timeout time.Duration
	gzip    bool
	tls     *tls.Config // nil: the system's roots, no client certificate
}

// otlpVar returns the value of the variable and its name: the metrics one where
// it is set, else the general one (OTLP exporter specification, "Configuration
// Options").
func otlpVar(name string) (value, variable string) {
	for _, prefix := range []string{"OTEL_EXPORTER_OTLP_METRICS_", "OTEL_EXPORTER_OTLP_"} {
		variable = prefix + name
		if value = strings.TrimSpace(os.Getenv(variable)); value != "" {
			return value, variable
		}
	}
	return "", variable
}

func readOTLPEnv() (otlpEnv, error) {
	env := otlpEnv{timeout: 10 * time.Second}
	if v, variable := otlpVar("TIMEOUT"); v != "" {
		ms, err := strconv.Atoi(v)
		if err != nil || ms <= 0 {
			return env, fmt.Errorf("read %s=%q: want a number of milliseconds above 0, such as 10000", variable, v)
		}
		env.timeout = time.Duration(ms) * time.Millisecond
	}
	switch v, variable := otlpVar("COMPRESSION"); strings.ToLower(v) {
	case "", "none":
	case "gzip":
		env.gzip = true
	default:
		return env, fmt.Errorf("read %s=%q: unknown compression; set gzip or none", variable, v)
	}
	var config tls.Config
	if file, variable := otlpVar("CERTIFICATE"); file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return env, fmt.Errorf("read %s: %w; name a readable PEM file", variable, err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return env, fmt.Errorf("read %s=%q: no certificate in it; name a PEM file", variable, file)
		}
	}
	certs, err := clientCertificate()
	if err != nil {
		return env, err
	}
	config.Certificates = certs
	if config.RootCAs != nil || len(certs) > 0 {
		env.tls = &config
	}
	return env, nil
}

// clientCertificate reads the pair for mutual TLS. As in the official exporters
// a pair comes from one prefix as a whole.
func clientCertificate() ([]tls.Certificate, error) {
	for _, prefix := range []string{"OTEL_EXPORTER_OTLP_METRICS_", "OTEL_EXPORTER_OTLP_"} {
		certVar, keyVar := prefix+"CLIENT_CERTIFICATE", prefix+"CLIENT_KEY"
		cert, key := strings.TrimSpace(os.Getenv(certVar)), strings.TrimSpace(os.Getenv(keyVar))
		if cert == "" && key == "" {
			continue
		}
		if cert == "" || key == "" {
			return nil, fmt.Errorf("read %s=%q and %s=%q: one of the two is missing; set both", certVar, cert, keyVar, key)
		}
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("read %s=%q and %s=%q: %w; name PEM files that belong together", certVar, cert, keyVar, key, err)
		}
		return []tls.Certificate{pair}, nil
	}
	return nil, nil
}
