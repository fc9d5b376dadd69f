package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/config"
)

func help(_ context.Context, t *terminal, flags *flag.FlagSet) error {
	args, err := parse(t, flags, 1)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		printHelp(t.stdout)
		return nil
	}
	if args[0] == "environment" {
		printVariables(t.stdout)
		return nil
	}
	all := commands()
	i := slices.IndexFunc(all, func(c command) bool { return c.name == args[0] })
	if i < 0 {
		return usageError{noCommand(args[0])}
	}
	// Every command declares its flags before it parses them.
	sub := flag.NewFlagSet(args[0], flag.ContinueOnError)
	sub.SetOutput(io.Discard)
	_ = all[i].run(context.Background(), &terminal{args: []string{"-h"}, stdout: io.Discard, stderr: io.Discard}, sub)
	printCommandHelp(t.stdout, all[i], sub)
	return nil
}

func printHelp(w io.Writer) {
	fmt.Fprint(w, `unitmeter meters the network traffic of every systemd unit and sends it as
OpenTelemetry metrics.

Usage: unitmeter [COMMAND] [ARGUMENTS]

Commands:
`)
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-12s%s\n", c.name, c.summary)
	}
	fmt.Fprint(w, `
Environment variables configure unitmeter: see "unitmeter help environment". With
an OpenTelemetry Collector on this host, none is needed.

Exit codes: 0 success; 1 failure; 2 wrong command line or environment.
`)
}

func printCommandHelp(w io.Writer, c command, flags *flag.FlagSet) {
	line := "Usage: unitmeter " + c.name
	if c.arguments != "" {
		line += " " + c.arguments
	}
	fmt.Fprintf(w, "%s\n\n%s.\n", line, c.summary)
	first := true
	flags.VisitAll(func(f *flag.Flag) {
		if first {
			fmt.Fprint(w, "\nFlags:\n")
			first = false
		}
		usage := f.Usage
		// A flag with one of these has no default.
		if !slices.Contains([]string{"", "0", "false", "0s"}, f.DefValue) {
			usage += " (default " + f.DefValue + ")"
		}
		name := "--" + f.Name
		if len(f.Name) == 1 {
			name = "-" + f.Name
		}
		fmt.Fprintf(w, "  %-16s%s\n", name, usage)
	})
}

// printVariables prints the reference of the variables for 80 columns.
func printVariables(w io.Writer) {
	group := ""
	for _, v := range config.Variables() {
		if v.Group != group {
			if group != "" {
				fmt.Fprintln(w)
			}
			group = v.Group
			fmt.Fprintf(w, "%s\n%s\n", group, strings.Repeat("-", len(group)))
		}
		fmt.Fprintf(w, "\n%s\n", v.Name)
		if v.Specific != "" {
			fmt.Fprintln(w, v.Specific)
		}
		texts := []string{v.Meaning, "Values: " + v.Values}
		if v.Default != "" {
			texts = append(texts, "Default: "+v.Default)
		}
		for _, text := range texts {
			fmt.Fprintf(w, "    %s\n", tty.Wrap(text, 4, 78))
		}
	}
}
