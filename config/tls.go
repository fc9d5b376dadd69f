package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
)

// maxFile bounds the files that variables name, in bytes. The certificates of
// all public authorities together are a quarter of it.
const maxFile = 1 << 20

// readFile reads a small regular file. A FIFO or a device would make the agent
// hang before it has said a word.
func readFile(name string) (content []byte, mode fs.FileMode, reason string) {
	info, err := os.Stat(name)
	if err == nil && !info.Mode().IsRegular() {
		return nil, 0, "not a regular file"
	}
	if err == nil && info.Size() > maxFile {
		return nil, 0, "larger than 1 MiB"
	}
	var f *os.File
	if err == nil {
		f, err = os.Open(name)
	}
	if err == nil {
		defer f.Close()
		content, err = io.ReadAll(io.LimitReader(f, maxFile))
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, 0, "no such file"
	case errors.Is(err, fs.ErrPermission):
		return nil, 0, "permission denied"
	case err != nil:
		// The name is in the message of the variable already.
		var pathErr *fs.PathError
		if errors.As(err, &pathErr) {
			err = pathErr.Err
		}
		return nil, 0, err.Error()
	}
	return content, info.Mode(), ""
}

const (
	hintFile  = "name a file that the agent's user can read"
	hintPEM   = "name a PEM file; it begins with -----BEGIN CERTIFICATE-----"
	hintRenew = "renew the certificate, or check the clock"
)

// parseCertificates reads all certificates of a PEM file. odd is how many it
// cannot read: a newer Go is stricter than what made some of them.
func parseCertificates(content []byte) (certs []*x509.Certificate, odd int, reason string) {
	other, begun := "", bytes.Count(content, []byte("-----BEGIN CERTIFICATE-----"))
	for {
		var block *pem.Block
		if block, content = pem.Decode(content); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			other = block.Type
		} else if cert, err := x509.ParseCertificate(block.Bytes); err == nil {
			certs = append(certs, cert)
		}
	}
	// pem.Decode passes over a block that was cut off.
	odd = begun - len(certs)
	switch {
	case len(certs) > 0:
	case begun == 1:
		reason = "the certificate in it is damaged or cut off"
	case begun > 1:
		reason = fmt.Sprintf("all %d certificates in it are damaged or cut off", begun)
	case other != "":
		reason = "holds a " + strings.ToLower(shorten(printable(other))) + " and no certificate"
	default:
		reason = "holds no certificate in PEM form"
	}
	return certs, odd, reason
}

// validNow says why a certificate cannot be used now.
func (l *loader) validNow(cert *x509.Certificate) string {
	const layout = "2006-01-02 15:04 MST"
	if l.now.After(cert.NotAfter) {
		return "expired on " + cert.NotAfter.UTC().Format(layout)
	}
	if l.now.Before(cert.NotBefore) {
		return "not valid before " + cert.NotBefore.UTC().Format(layout)
	}
	return ""
}

// finishTLS reads the files for TLS, now and whenever one of them is renewed.
func (l *loader) finishTLS() {
	f := Files{
		Certificate:       l.given["OTEL_EXPORTER_OTLP_CERTIFICATE"].text,
		ClientCertificate: l.given["OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"].text,
		ClientKey:         l.given["OTEL_EXPORTER_OTLP_CLIENT_KEY"].text,
	}
	if l.cfg.Files = f; f == (Files{}) {
		return
	}
	l.cfg.OTLP.TLS = newRenewed(l, (*loader).readTLS, f.Certificate, f.ClientCertificate, f.ClientKey).get
}

func (l *loader) readTLS() *tls.Config {
	settings := &tls.Config{MinVersion: tls.VersionTLS12}
	if s, ok := l.given["OTEL_EXPORTER_OTLP_CERTIFICATE"]; ok {
		settings.RootCAs = l.readRoots(s)
	}
	settings.Certificates = l.readClientPair()
	return settings
}

// readRoots reads OTEL_EXPORTER_OTLP_CERTIFICATE. A bundle may have expired
// certificates among others, as those of distributions have.
func (l *loader) readRoots(s setting) *x509.CertPool {
	content, _, reason := readFile(s.text)
	if reason != "" {
		l.bad(s, reason, hintFile)
		return nil
	}
	certs, odd, reason := parseCertificates(content)
	if reason != "" {
		l.bad(s, reason, hintPEM)
		return nil
	}
	pool, usable := x509.NewCertPool(), false
	for _, cert := range certs {
		pool.AddCert(cert)
		if reason = l.validNow(cert); reason == "" {
			usable = true
		}
	}
	if !usable {
		l.bad(s, reason, hintRenew)
		return nil
	}
	if odd > 0 {
		l.warn(fmt.Sprintf("%s: %d of the %d certificates in %s cannot be read, and only the others are trusted: remove or replace them", s.name, odd, odd+len(certs), shorten(s.text)))
	}
	return pool
}

// readClientPair reads the certificate and key for mutual TLS. As in the
// official exporters both come from the same pair of variables.
func (l *loader) readClientPair() []tls.Certificate {
	const general, metrics = "OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_METRICS_"
	cert, hasCert := l.given[general+"CLIENT_CERTIFICATE"]
	key, hasKey := l.given[general+"CLIENT_KEY"]
	certPrefix := strings.TrimSuffix(cert.name, "CLIENT_CERTIFICATE")
	keyPrefix := strings.TrimSuffix(key.name, "CLIENT_KEY")
	alone := func(s setting, other string) {
		l.bad(s, "it is alone, and a certificate and its key go together", "set "+other+" as well, or unset both")
	}
	switch {
	case !hasCert && !hasKey:
	case !hasCert:
		alone(key, keyPrefix+"CLIENT_CERTIFICATE")
	case !hasKey:
		alone(cert, certPrefix+"CLIENT_KEY")
	case certPrefix != keyPrefix && certPrefix == metrics:
		alone(cert, metrics+"CLIENT_KEY")
	case certPrefix != keyPrefix:
		alone(key, metrics+"CLIENT_CERTIFICATE")
	default:
		certPEM, ok := l.readClientCertificate(cert)
		keyPEM, keyOK := l.readClientKey(key)
		if !ok || !keyOK {
			return nil
		}
		pair, err := tls.X509KeyPair(certPEM, keyPEM)
		if err != nil {
			l.bad(key, strings.TrimPrefix(err.Error(), "tls: "), "name the key that belongs to "+cert.name)
			return nil
		}
		return []tls.Certificate{pair}
	}
	return nil
}

// readClientCertificate answers false if it has reported a problem.
func (l *loader) readClientCertificate(s setting) ([]byte, bool) {
	content, _, reason := readFile(s.text)
	if reason != "" {
		l.bad(s, reason, hintFile)
		return nil, false
	}
	certs, odd, reason := parseCertificates(content)
	if odd > 0 && reason == "" {
		reason = fmt.Sprintf("%d of the %d certificates in it are damaged or cut off", odd, odd+len(certs))
	}
	if reason != "" {
		l.bad(s, reason, hintPEM)
		return nil, false
	}
	if reason = l.validNow(certs[0]); reason != "" {
		l.bad(s, reason, hintRenew)
		return nil, false
	}
	// Some live for an hour, and are renewed in time.
	if begin, end := certs[0].NotBefore, certs[0].NotAfter; end.Sub(l.now) < min(14*day, end.Sub(begin)/10) {
		l.warn(fmt.Sprintf("the certificate of %s expires on %s", s.name, end.UTC().Format(time.DateOnly)))
	}
	return content, true
}

// readClientKey answers false if it has reported a problem.
func (l *loader) readClientKey(s setting) ([]byte, bool) {
	content, mode, reason := readFile(s.text)
	if reason != "" {
		l.bad(s, reason, hintFile)
		return nil, false
	}
	// The key need not come first: openssl puts the parameters of a curve there.
	var block *pem.Block
	for rest := content; ; {
		if block, rest = pem.Decode(rest); block == nil {
			l.bad(s, "holds no private key in PEM form", "name a PEM file; it begins with -----BEGIN PRIVATE KEY-----")
			return nil, false
		}
		if strings.HasSuffix(block.Type, "PRIVATE KEY") {
			break
		}
	}
	if strings.HasPrefix(block.Type, "ENCRYPTED") || block.Headers["DEK-Info"] != "" {
		l.bad(s, "the key is encrypted, and there is nobody to ask for its password", "name a key without a password")
		return nil, false
	}
	if mode&readableByOthers != 0 {
		l.warn(fmt.Sprintf("%s: every user can read %s; take the right away with chmod o-r", s.name, shorten(s.text)))
	}
	return content, true
}

// readableByOthers is the mode bit that a file with a secret should not have.
const readableByOthers fs.FileMode = 0o004
