// Command generate writes what packages hold about the command line and the
// variables: the man page, the environment file, and the shell completions. All
// of it comes from "unitmeter help" and config.Variables, so that none of it can
// say anything else than the program does.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

//go:generate go run . -o ..

func main() {
	out := flag.String("o", ".", "the directory to write to; the completions go below it")
	program := flag.String("program", "", "the unitmeter to ask; empty is to build one")
	flag.Parse()
	if err := generate(*out, *program); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func generate(out, program string) error {
	if program == "" {
		dir, err := os.MkdirTemp("", "unitmeter-generate-")
		if err != nil {
			return fmt.Errorf("make a directory for the program: %w", err)
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "unitmeter")
		build := exec.Command("go", "build", "-o", program, "github.com/unitmeter/unitmeter/cmd/unitmeter")
		build.Stderr = os.Stderr
		if err := build.Run(); err != nil {
			return fmt.Errorf("build unitmeter: %w", err)
		}
	}
	commands, err := ask(program)
	if err != nil {
		return err
	}
	for name, text := range map[string]string{
		"unitmeter.8":               manPage(commands),
		"unitmeter.env":             environmentFile(),
		"completion/unitmeter.bash": bash(commands),
		"completion/_unitmeter":     zsh(commands),
		"completion/unitmeter.fish": fish(commands),
	} {
		file := filepath.Join(out, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

// command is one subcommand, as its help tells it.
type command struct {
	name, arguments, summary string
	flags                    []option
}

// option is a flag; its name has the dashes.
type option struct{ name, value, meaning string }

// units says that the command takes names of units.
func (c command) units() bool { return strings.Contains(c.arguments, "UNIT") }

var (
	listed   = regexp.MustCompile(`(?m)^  ([a-z]+) +\S`)
	usage    = regexp.MustCompile(`^Usage: unitmeter [a-z]+ ?(.*)\n\n((?s:.*?))\.\n`)
	flagLine = regexp.MustCompile(`(?m)^  (--?[a-z-]+) *(.*)$`)
)

// ask learns the subcommands from the program's help.
func ask(program string) ([]command, error) {
	text, err := help(program)
	if err != nil {
		return nil, err
	}
	var all []command
	for _, m := range listed.FindAllStringSubmatch(text, -1) {
		c := command{name: m[1]}
		if text, err = help(program, c.name); err != nil {
			return nil, err
		}
		head := usage.FindStringSubmatch(text)
		if head == nil {
			return nil, fmt.Errorf("read the help of %s: it does not begin with its usage and its summary:\n%s", c.name, text)
		}
		c.arguments, c.summary = head[1], head[2]
		for _, f := range flagLine.FindAllStringSubmatch(text, -1) {
			value := regexp.MustCompile(`[\[|]` + f[1] + ` ([A-Z]+)`).FindStringSubmatch(c.arguments)
			c.flags = append(c.flags, option{name: f[1], value: strings.Join(value[min(1, len(value)):], ""), meaning: f[2]})
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("read the help of %s: no subcommand is listed in it:\n%s", program, text)
	}
	return all, nil
}

func help(program string, topic ...string) (string, error) {
	text, err := exec.Command(program, append([]string{"help"}, topic...)...).Output()
	if err != nil {
		return "", fmt.Errorf("run %s help %s: %w", program, strings.Join(topic, " "), err)
	}
	return string(text), nil
}
