package otlptest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// CA is a certificate authority for one test.
type CA struct {
	// File is its certificate in PEM, for OTEL_EXPORTER_OTLP_CERTIFICATE.
	File string

	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes a certificate authority with its files in a directory of the test.
func NewCA(tb testing.TB) *CA {
	tb.Helper()
	ca := &CA{dir: tb.TempDir()}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "otlptest CA"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, key := ca.issue(tb, template)
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatalf("make CA: %v", err)
	}
	ca.cert, ca.key = cert, key
	ca.File = ca.write(tb, "ca.pem", "CERTIFICATE", der)
	return ca
}

// Server returns the configuration of a server on localhost. With mutual set it
// asks for a client certificate of the same authority.
func (ca *CA) Server(tb testing.TB, mutual bool) *tls.Config {
	tb.Helper()
	der, key := ca.issue(tb, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	config := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"h2", "http/1.1"}}
	if mutual {
		config.ClientAuth = tls.RequireAndVerifyClientCert
		config.ClientCAs = x509.NewCertPool()
		config.ClientCAs.AddCert(ca.cert)
	}
	return config
}

// ServerFiles makes a certificate for a server at the addresses and returns its PEM
// files. Without any it has a common name only, which counts for nothing.
func (ca *CA) ServerFiles(tb testing.TB, addresses ...net.IP) (certFile, keyFile string) {
	tb.Helper()
	return ca.pair(tb, "server", &x509.Certificate{
		SerialNumber: big.NewInt(4), Subject: pkix.Name{CommonName: "server"}, IPAddresses: addresses,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
}

// Client makes a client certificate with the given common name and returns its
// PEM files, for OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and _CLIENT_KEY.
func (ca *CA) Client(tb testing.TB, name string) (certFile, keyFile string) {
	tb.Helper()
	return ca.pair(tb, name, &x509.Certificate{
		SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// pair signs a certificate and returns it and its key as PEM files.
func (ca *CA) pair(tb testing.TB, name string, template *x509.Certificate) (certFile, keyFile string) {
	tb.Helper()
	der, key := ca.issue(tb, template)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatalf("make client key: %v", err)
	}
	return ca.write(tb, name+".pem", "CERTIFICATE", der), ca.write(tb, name+".key", "PRIVATE KEY", pkcs8)
}

// issue signs a certificate for a new key; the authority's own with that key.
func (ca *CA) issue(tb testing.TB, template *x509.Certificate) ([]byte, *ecdsa.PrivateKey) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatalf("make key: %v", err)
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	parent, signer := ca.cert, ca.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		tb.Fatalf("make certificate: %v", err)
	}
	return der, key
}

func (ca *CA) write(tb testing.TB, name, kind string, der []byte) string {
	tb.Helper()
	path := filepath.Join(ca.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		tb.Fatalf("write %s: %v", name, err)
	}
	return path
}
