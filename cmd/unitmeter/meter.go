package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver/ebpf"
)

// loadTimeout bounds the loading, of which reading the kernel's types is the most.
const loadTimeout = time.Minute

// manageMeter is the command "meter": it loads the eBPF program that counts for
// UNITMETER_SOURCE=ebpf, takes it away, and says how it is.
func manageMeter(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	args, err := parse(t, flags, 1)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		return usageError{errors.New("say what to do: load, unload or status")}
	}
	switch args[0] {
	case "load":
		return loadMeter(ctx, t)
	case "unload":
		if err := ebpf.Unload(""); err != nil {
			return err
		}
		_, err := fmt.Fprintln(t.stdout, "nothing is counted by eBPF any more")
		return err
	case "status":
		return showMeter(t)
	}
	return usageError{fmt.Errorf("%q is none of load, unload and status; see \"unitmeter help meter\"", args[0])}
}

func loadMeter(ctx context.Context, t *terminal) error {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	loaded, err := ebpf.Load(ctx, ebpf.LoadConfig{})
	if err != nil {
		return err
	}
	if loaded.Naming != nil {
		fmt.Fprintln(t.stderr, "warning:", tty.Line(loaded.Naming))
	}
	if loaded.Unnamed > 0 {
		fmt.Fprintf(t.stderr, "warning: %d cgroups found no room for their name\n", loaded.Unnamed)
	}
	text := "counting the traffic of all cgroups, %d at present\n"
	if loaded.Updated {
		text = "the program was replaced, without a gap; %d cgroups at present\n"
	}
	_, err = fmt.Fprintf(t.stdout, text, loaded.Cgroups)
	return err
}

// showMeter prints the state of the loaded meter. Without one it fails.
func showMeter(t *terminal) error {
	reader, err := ebpf.Open(ebpf.Config{ReadOnly: true})
	if err != nil {
		return err
	}
	sweep, err := reader.Read()
	if err = errors.Join(err, reader.Close()); err != nil {
		return err
	}
	lost := sweep.Lost
	_, err = fmt.Fprintf(t.stdout, "counting since %s\n%d of %d entries in use\nwithout an entry: %d bytes received, %d bytes sent\nwithout a name: %d cgroups\n",
		sweep.Since.Local().Format(time.DateTime), sweep.Entries, sweep.MaxEntries, lost.Received.Bytes, lost.Sent.Bytes, lost.Names)
	return err
}
