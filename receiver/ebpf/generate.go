//go:build ignore

// Command generate compiles meter.bpf.c by bpf2go, if the pinned clang is here.
// Where it is not, it verifies that the committed objects belong to the source.
package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
)

// Another version of clang gives other bytes. This one is Debian 12's.
const (
	clang        = "clang-14"
	strip        = "llvm-strip-14"
	clangVersion = "14.0.6"
	flags        = "-O2 -mcpu=v2 -Wall -Wextra -Werror -Wno-unused-function -Wno-unused-variable -Wno-unused-parameter"
	// cilium/ebpf supports 64-bit only; other_*.go say so on the rest.
	tags    = "linux,!386,!arm,!mips,!mipsle"
	sumFile = "meter.sum"
)

func main() {
	if err := generate(); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func generate() error {
	sum, err := sourceSum()
	if err != nil {
		return err
	}
	if !hasClang() {
		if old, err := os.ReadFile(sumFile); err != nil || string(old) != sum {
			return errors.New("the objects are older than meter.bpf.c: install clang-14 and llvm-14 and run go generate again")
		}
		return nil
	}
	bpf2go := exec.Command("go", "tool", "bpf2go", "-go-package", "ebpf", "-cc", clang, "-strip", strip, "-cflags", flags,
		"-target", "bpfel,bpfeb", "-tags", tags, "-type", "counts", "meter", "meter.bpf.c")
	if out, err := bpf2go.CombinedOutput(); err != nil {
		return fmt.Errorf("compile meter.bpf.c: %w\n%s", err, out)
	}
	return os.WriteFile(sumFile, []byte(sum), 0o644)
}

// sourceSum is the hash of all that the objects are made of.
func sourceSum() (string, error) {
	sum := sha256.New()
	for _, file := range []string{"meter.bpf.c", "kernel.h"} {
		text, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		sum.Write(text)
	}
	fmt.Fprintln(sum, clangVersion, flags)
	return fmt.Sprintf("%x\n", sum.Sum(nil)), nil
}

func hasClang() bool {
	version, err := exec.Command(clang, "--version").Output()
	if err != nil || !bytes.Contains(version, []byte(" "+clangVersion)) {
		return false
	}
	_, err = exec.LookPath(strip)
	return err == nil
}
