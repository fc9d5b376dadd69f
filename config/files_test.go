package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The validity of the test certificates that are not valid now. They are fixed,
// because the messages name them.
var (
	expired = time.Date(2020, 2, 2, 12, 0, 0, 0, time.UTC)
	future  = time.Date(2199, 2, 2, 12, 0, 0, 0, time.UTC)
)

// writeFiles fills a directory with the files that variables of the tests name.
func writeFiles(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, content []byte, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), content, mode); err != nil {
			t.Fatal(err)
		}
	}
	key, other := newKey(t), newKey(t)
	now := time.Now()
	ca := certificate(t, key, now.Add(-time.Hour), now.Add(365*day))
	old := certificate(t, key, expired.Add(-day), expired)
	write("ca.pem", ca, 0o644)
	write("cert.pem", ca, 0o644)
	write("soon.pem", certificate(t, key, now.Add(-60*day), now.Add(3*day)), 0o644)
	write("expired.pem", old, 0o644)
	write("future.pem", certificate(t, key, future, future.Add(day)), 0o644)
	write("bundle.pem", append(old[:len(old):len(old)], ca...), 0o644)
	write("damaged.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("not DER")}), 0o644)
	write("odd.pem", append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("not DER")}), ca...), 0o644)
	write("cut.pem", append(ca[:len(ca):len(ca)], ca[:len(ca)/2]...), 0o644)
	write("key.pem", keyPEM(t, key), 0o600)
	write("openkey.pem", keyPEM(t, key), 0o644)
	write("otherkey.pem", keyPEM(t, other), 0o600)
	write("encrypted.pem", pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")}), 0o600)
	write("lockedkey.pem", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "x"}, Bytes: []byte("x")}), 0o600)
	curve := pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte("x")})
	write("curvekey.pem", append(curve, keyPEM(t, key)...), 0o600)
	write("text", []byte("hello\n"), 0o644)
	write("huge", []byte(strings.Repeat("x", maxFile+1)), 0o644)

	write("headers", []byte("# for the vendor\n\nX-Tenant = blue%2Cgreen \napi-key="+secret+"\na=1,b=2\n"), 0o600)
	write("open", []byte("api-key="+secret), 0o644)
	write("comments", []byte("# nothing\n\n"), 0o600)
	write("crlf", []byte("api-key="+secret+"\r\n"), 0o600)
	write("badlines", []byte("ok=1\nauthorization: Bearer "+secret+"\nx=%zz"+secret+"\nbad name="+secret+"\na=1, ,b=\n"), 0o600)
	write("leftovers", []byte("a="+secret+" # for the vendor\nb=${"+secret+"}\nc=\""+secret+"\"\n"), 0o600)
	write("reserved", []byte("grpc-timeout="+secret+"\n"), 0o600)
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func keyPEM(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// certificate makes one that signs itself, good for servers on this host.
func certificate(t *testing.T, key *ecdsa.PrivateKey, from, to time.Time) []byte {
	t.Helper()
	template := x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "unitmeter test"},
		NotBefore:             from,
		NotAfter:              to,
		DNSNames:              []string{"localhost"},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
