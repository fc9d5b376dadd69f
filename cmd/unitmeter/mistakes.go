package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/config"
)

// Answers to command lines that say something else than was meant.

// noCommand is the error for a command that does not exist, with the one that was
// meant.
func noCommand(name string) error {
	// Names are those of other programs for the same thing.
	others := map[string]string{
		"status": "doctor", "check": "doctor", "list": "units", "ls": "units", "start": "run", "daemon": "run", "serve": "run",
		"show": "once", "stats": "once", "live": "top", "watch": "top", "monitor": "top", "load": "meter load", "unload": "meter unload",
		"environment": "help environment", "env": "help environment", "config": "help environment", "log": "history", "report": "history",
	}
	lower := strings.ToLower(name)
	guess := others[lower]
	if guess == "" {
		guess = nearest(lower, append(commandNames(), slices.Sorted(maps.Keys(others))...))
		guess = cmp.Or(others[guess], guess)
	}
	if guess == "" {
		return fmt.Errorf("there is no command %q; see \"unitmeter help\"", tty.Clean(name))
	}
	return fmt.Errorf("there is no command %q; did you mean \"unitmeter %s\"? See \"unitmeter help\"", tty.Clean(name), guess)
}

func commandNames() []string {
	var names []string
	for _, c := range commands() {
		names = append(names, c.name)
	}
	return names
}

// nearest is the known word that was probably meant, or "".
func nearest(word string, known []string) string {
	var longer []string
	for _, k := range known {
		if strings.HasPrefix(k, word) {
			longer = append(longer, k)
		}
	}
	if len(longer) == 1 {
		return longer[0]
	}
	return config.Nearest(word, known, min(2, len(word)-1))
}

// explainFlag says of an error of the flag package what to write instead.
func explainFlag(err error, flags *flag.FlagSet, args []string) error {
	see := fmt.Sprintf("see \"unitmeter help %s\"", flags.Name())
	text := err.Error()
	if name, found := strings.CutPrefix(text, "flag needs an argument: -"); found {
		return fmt.Errorf("--%s needs a value behind it; %s", name, see)
	}
	if value, rest, found := strings.Cut(strings.TrimPrefix(text, "invalid value "), " for flag -"); found {
		name, reason, _ := strings.Cut(rest, ": ")
		return fmt.Errorf("--%s has the value %s: %s; %s", name, value, reason, see)
	}
	name, found := strings.CutPrefix(text, "flag provided but not defined: -")
	if !found {
		return fmt.Errorf("%w; %s", err, see)
	}
	dashed := "--" + name
	if len(name) == 1 {
		dashed = "-" + name
	}
	// Flags before the command are those of run, which has none.
	if flags.Name() == "run" {
		if i := slices.IndexFunc(args, func(arg string) bool { return slices.Contains(commandNames(), arg) }); i >= 0 && args[i] != "run" {
			return fmt.Errorf("%s stands before the command; write \"unitmeter %s\" first, and flags behind it", dashed, args[i])
		}
		if slices.Contains(commandNames(), name) {
			return fmt.Errorf("there is no flag %s; did you mean \"unitmeter %s\"? %s", dashed, name, strings.ToUpper(see[:1])+see[1:])
		}
		if variable := variableOf(name); variable != "" {
			return fmt.Errorf("there is no flag %s: environment variables configure the agent; set %s, or see \"unitmeter help environment\"", dashed, variable)
		}
	}
	var known []string
	flags.VisitAll(func(f *flag.Flag) { known = append(known, f.Name) })
	if guess := nearest(strings.ToLower(name), known); guess != "" {
		return fmt.Errorf("there is no flag %s; did you mean --%s? %s", dashed, guess, strings.ToUpper(see[:1])+see[1:])
	}
	if len(known) == 0 {
		return fmt.Errorf("there is no flag %s: %s has none; %s, and \"unitmeter help environment\" for the settings", dashed, flags.Name(), see)
	}
	return fmt.Errorf("there is no flag %s; %s has --%s; %s", dashed, flags.Name(), strings.Join(known, ", --"), see)
}

// variableOf names the variable that does what a flag of run was meant to do, or "".
func variableOf(name string) string {
	var problem *config.Problem
	_, err := config.Load([]string{"HOME=/", "UNITMETER_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_")) + "="})
	if !errors.As(err, &problem) {
		return ""
	}
	guess, found := strings.CutPrefix(problem.Hint, "did you mean ")
	if !found {
		return ""
	}
	guess, _, _ = strings.Cut(guess, "?")
	return guess
}

// duration is the value of a flag: a number is seconds.
type duration time.Duration

// String implements flag.Value.
func (d *duration) String() string { return time.Duration(*d).String() }

// Set implements flag.Value.
func (d *duration) Set(text string) error {
	if _, err := strconv.ParseFloat(text, 64); err == nil {
		text += "s"
	}
	parsed, err := time.ParseDuration(text)
	if err != nil {
		return errors.New("want seconds, or a duration such as 500ms, 5s or 1m")
	}
	*d = duration(parsed)
	return nil
}

// durationFlag defines a flag for a time. Its value may be a number of seconds.
func durationFlag(flags *flag.FlagSet, to *time.Duration, name string, value time.Duration, usage string) {
	*to = value
	flags.Var((*duration)(to), name, usage)
}
