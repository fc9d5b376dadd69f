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

// parseCertificates reads all certificates of a PEM file.
func parseCertificates(content []byte) (certs []*x509.Certificate, reason string) {
	other, begun := "", bytes.Count(content, []byte("-----BEGIN CERTIFICATE-----"))
	for {
		var block *pem.Block
		if block, content = pem.Decode(content); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			other = block.Type
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Sprintf("certificate %d in it is damaged", len(certs)+1)
		}
		certs = append(certs, cert)
	}
	// pem.Decode passes over a block that was cut off.
	if len(certs) < begun {
		return nil, fmt.Sprintf("%d of the %d certificates in it cannot be read to their end", begun-len(certs), begun)
	}
	if len(certs) == 0 && other != "" {
		return nil, "holds a " + strings.ToLower(shorten(printable(other))) + " and no certificate"
	}
	if len(certs) == 0 {
		return nil, "holds no certificate in PEM form"
	}
	return certs, ""
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

// checkRoots checks OTEL_EXPORTER_OTLP_CERTIFICATE. A bundle may have expired
// certificates among others, as those of distributions have.
func (l *loader) checkRoots(file string, bad report) {
	content, _, reason := readFile(file)
	if reason != "" {
		bad(reason, hintFile)
		return
	}
	certs, reason := parseCertificates(content)
	if reason != "" {
		bad(reason, hintPEM)
		return
	}
	pool, usable := x509.NewCertPool(), false
	for _, cert := range certs {
		pool.AddCert(cert)
		if reason = l.validNow(cert); reason == "" {
			usable = true
		}
	}
	if !usable {
		bad(reason, hintRenew)
		return
	}
	l.tls().RootCAs = pool
}

// tls returns the TLS settings of OTLP, to be filled.
func (l *loader) tls() *tls.Config {
	if l.cfg.OTLP.TLS == nil {
		l.cfg.OTLP.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return l.cfg.OTLP.TLS
}

// checkClientPair reads the certificate and key for mutual TLS. As in the
// official exporters both come from the same pair of variables.
func (l *loader) checkClientPair() {
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
		l.cfg.OTLP.ClientCertificateFile, l.cfg.OTLP.ClientKeyFile = cert.text, key.text
		certPEM, ok := l.readClientCertificate(cert)
		keyPEM, keyOK := l.readClientKey(key)
		if !ok || !keyOK {
			return
		}
		pair, err := tls.X509KeyPair(certPEM, keyPEM)
		if err != nil {
			l.bad(key, strings.TrimPrefix(err.Error(), "tls: "), "name the key that belongs to "+cert.name)
			return
		}
		l.tls().Certificates = []tls.Certificate{pair}
	}
}

// readClientCertificate answers false if it has reported a problem.
func (l *loader) readClientCertificate(s setting) ([]byte, bool) {
	content, _, reason := readFile(s.text)
	if reason != "" {
		l.bad(s, reason, hintFile)
		return nil, false
	}
	certs, reason := parseCertificates(content)
	if reason != "" {
		l.bad(s, reason, hintPEM)
		return nil, false
	}
	if reason = l.validNow(certs[0]); reason != "" {
		l.bad(s, reason, hintRenew)
		return nil, false
	}
	if end := certs[0].NotAfter; end.Sub(l.now) < 14*day {
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
