package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// patience bounds each wait. All of them take seconds; a loaded machine takes
// longer.
const patience = 3 * time.Minute

// findFiles returns where each file that the rig needs is on the host, by its
// path inside, and the directories they are in.
func findFiles(unitmeter string) (files map[string]string, dirs []string, err error) {
	files = map[string]string{
		"/usr/local/bin/nats-server": ".tools/bin/nats-server",
		"/usr/local/bin/nats":        ".tools/bin/nats",
		"/usr/local/bin/otelcol":     ".tools/bin/otelcol",
		"/usr/local/bin/unitmeter":   unitmeter,
		"/etc/otelcol/config.yaml":   "examples/otel-collector/config.yaml",
	}
	for to, from := range files {
		if _, err := os.Stat(from); err != nil {
			return nil, nil, fmt.Errorf("find %s: %w; run \"make demo\" in the root of the checkout", from, err)
		}
		if files[to], err = filepath.Abs(from); err != nil {
			return nil, nil, err
		}
		dirs = append(dirs, filepath.Dir(files[to]))
	}
	return files, dirs, nil
}

// inside runs commands in the rig.
type inside struct{ *systemdtest.Rig }

// install copies the files to where users without rights can reach them: the
// checkout may be in a home directory.
func (in inside) install(ctx context.Context, files map[string]string) error {
	for to, from := range files {
		if _, err := in.quietly(ctx, "install", "-D", "-m", "755", from, to); err != nil {
			return err
		}
	}
	return nil
}

// run prints a command as a person would type it, runs it, prints its output
// and returns that without the space around it.
func (in inside) run(ctx context.Context, name string, args ...string) (string, error) {
	fmt.Printf("  $ %s\n", typed(name, args...))
	out, err := in.quietly(ctx, name, args...)
	for line := range strings.Lines(out) {
		fmt.Printf("    %s\n", strings.TrimRight(line, "\n"))
	}
	return out, err
}

// quietly is run without the printing.
func (in inside) quietly(ctx context.Context, name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := in.Command(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", typed(name, args...), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(stdout.String()), nil
}

// typed is a command line for a shell.
func typed(name string, args ...string) string {
	words := append([]string{name}, args...)
	for i, w := range words {
		if strings.ContainsAny(w, " $;") {
			words[i] = "'" + w + "'"
		}
	}
	return strings.Join(words, " ")
}

func (in inside) write(ctx context.Context, path, content string) error {
	fmt.Printf("  $ cat %s\n", path)
	for line := range strings.Lines(content) {
		fmt.Print("    " + line)
	}
	cmd := in.Command(ctx, "tee", path)
	cmd.Stdin = strings.NewReader(content)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// await polls until done, for as long as there is patience.
func (in inside) await(ctx context.Context, what string, done func() (bool, error)) error {
	deadline := time.Now().Add(patience)
	for {
		if ok, err := done(); err != nil || ok {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for %s: nothing within %s", what, patience)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// load runs nats bench in the server's own network, and prints its figures.
func (in inside) load(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	bench := func(args ...string) *exec.Cmd {
		args = append([]string{"--quiet", "--wait", "--pipe", "-p", "PrivateNetwork=yes", "-p", "JoinsNamespaceOf=" + unit, "nats", "bench"}, args...)
		fmt.Printf("  $ %s\n", typed("systemd-run", args...))
		return in.Command(ctx, "systemd-run", args...)
	}
	var figures, complaints bytes.Buffer
	sub := bench("sub", "demo", "--clients", fmt.Sprint(subscribers), "--msgs", fmt.Sprint(messages), "--no-progress")
	sub.Stdout, sub.Stderr = &figures, &complaints
	if err := sub.Start(); err != nil {
		return err
	}
	// A subscriber that comes late would wait for ever for what it missed.
	err := in.await(ctx, "the subscribers", func() (bool, error) {
		n, err := in.subscriptions(ctx)
		return n == subscribers, err
	})
	var published []byte
	if err == nil {
		published, err = bench("pub", "demo", "--clients", "1", "--msgs", fmt.Sprint(messages), "--size", fmt.Sprint(messageSize), "--no-progress").Output()
	}
	if err != nil {
		cancel()
		_ = sub.Wait() // killed just now
		return fmt.Errorf("publish to %s: %w; nats bench sub said: %s%s", unit, err, &figures, &complaints)
	}
	if err := sub.Wait(); err != nil {
		return fmt.Errorf("subscribe to %s: %w: %s", unit, err, bytes.TrimSpace(complaints.Bytes()))
	}
	fmt.Println("  nats bench says:")
	for line := range strings.Lines(string(published) + figures.String()) {
		if strings.Contains(line, "stats:") {
			fmt.Printf("    %s\n", strings.TrimSpace(line))
		}
	}
	return nil
}

// subscriptions asks the NATS server how many clients listen to the subject.
func (in inside) subscriptions(ctx context.Context) (int, error) {
	pid, err := in.quietly(ctx, "systemctl", "show", "--value", "-p", "MainPID", unit)
	if err != nil {
		return 0, err
	}
	// Only bash is sure to be there, and its only way to HTTP is this.
	out, err := in.quietly(ctx, "nsenter", "--target", pid, "--net", "bash", "-c",
		`exec 3<>/dev/tcp/127.0.0.1/8222; printf 'GET /connz?subs=1 HTTP/1.0\r\n\r\n' >&3; cat <&3`)
	if err != nil {
		return 0, err
	}
	var connz struct {
		Connections []struct {
			Subscriptions []string `json:"subscriptions_list"`
		} `json:"connections"`
	}
	_, body, _ := strings.Cut(out, "\r\n\r\n")
	if err := json.Unmarshal([]byte(body), &connz); err != nil {
		return 0, fmt.Errorf("read /connz of nats-server: %w", err)
	}
	n := 0
	for _, c := range connz.Connections {
		n += len(c.Subscriptions)
	}
	return n, nil
}

// settle returns the unit's counters when they have stood still for two
// seconds and the Collector has a sample from behind that.
func (in inside) settle(ctx context.Context) (counters, error) {
	var last counters
	var since time.Time
	err := in.await(ctx, "the end of the traffic", func() (bool, error) {
		now, err := in.show(ctx)
		if now != last || since.IsZero() {
			last, since = now, time.Now()
		}
		return time.Since(since) > 2*time.Second, err
	})
	if err != nil {
		return last, err
	}
	quiet := time.Now()
	return last, in.await(ctx, "a sample of "+unit+" in the Collector from now on", func() (bool, error) {
		got, err := in.collector()
		return got.newest.After(quiet), err
	})
}

// explain prints what the units of the demo logged.
func (in inside) explain(ctx context.Context) {
	for _, u := range []string{unit, "otelcol.service", "unitmeter.service"} {
		out, err := in.quietly(ctx, "journalctl", "--no-pager", "-o", "cat", "-n", "20", "-u", u)
		if err != nil {
			out = err.Error()
		}
		fmt.Fprintf(os.Stderr, "\n--- the last lines of %s\n%s\n", u, out)
	}
}
