package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/unitmeter/unitmeter/config"
)

// TestProgram has the tests of what is made from the program's help.
func TestProgram(t *testing.T) {
	path := filepath.Join(t.TempDir(), "unitmeter")
	if out, err := exec.Command("go", "build", "-o", path, "../../cmd/unitmeter").CombinedOutput(); err != nil {
		t.Fatalf("build unitmeter: %v\n%s", err, out)
	}
	commands, err := ask(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("files are current", func(t *testing.T) { testCurrent(t, path) })
	t.Run("commands are understood", func(t *testing.T) { testUnderstood(t, commands) })
	t.Run("man page", func(t *testing.T) { testManPage(t, commands) })
	t.Run("completions", func(t *testing.T) { testCompletions(t, commands) })
}

// What is committed must be what the program says today.
func testCurrent(t *testing.T, path string) {
	dir := t.TempDir()
	if err := generate(dir, path); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"unitmeter.8", "unitmeter.env", "completion/unitmeter.bash", "completion/_unitmeter", "completion/unitmeter.fish"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("packaging/%s is not current; run: go generate ./packaging/...", name)
		}
	}
}

func testUnderstood(t *testing.T, commands []command) {
	i := slices.IndexFunc(commands, func(c command) bool { return c.name == "once" })
	if i < 0 {
		t.Fatalf("once is not among the commands: %+v", commands)
	}
	once := commands[i]
	if !once.units() {
		t.Errorf("once takes units, but not according to %q", once.arguments)
	}
	for _, want := range []option{{name: "--json"}, {name: "--interval", value: "D"}} {
		if !slices.ContainsFunc(once.flags, func(f option) bool { return f.name == want.name && f.value == want.value && f.meaning != "" }) {
			t.Errorf("flags of once: %+v; want one like %+v", once.flags, want)
		}
	}
	for _, c := range commands {
		for f := range strings.FieldsSeq(strings.NewReplacer("[", " ", "]", " ", "|", " ").Replace(c.arguments)) {
			if strings.HasPrefix(f, "-") && !slices.ContainsFunc(c.flags, func(o option) bool { return o.name == f }) {
				t.Errorf("the usage of %s has %s, and its list of flags has not", c.name, f)
			}
		}
	}
}

// Each default in the file is what an unset variable stands for.
func TestEnvironmentFileHoldsTheDefaults(t *testing.T) {
	text := environmentFile()
	environ := []string{"STATE_DIRECTORY=/var/lib/unitmeter"}
	unset, err := config.Load(environ)
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if len(line) > 80 && strings.Contains(line, " ") && !strings.Contains(line, "=") {
			t.Errorf("longer than 80 characters: %s", line)
		}
		setting, isSetting := strings.CutPrefix(line, "#")
		if line == "" || strings.HasPrefix(setting, " ") || strings.HasPrefix(setting, "#") || setting == "" {
			continue
		}
		name, value, ok := strings.Cut(setting, "=")
		if !isSetting || !ok || named[name] {
			t.Fatalf("neither text nor a new setting: %q", line)
		}
		named[name] = true
		environ = append(environ, name+"="+strings.ReplaceAll(strings.Trim(value, `"`), `\\`, `\`)) // as systemd reads it
	}
	set, err := config.Load(environ)
	if err != nil {
		t.Fatalf("with every line of the file active: %v", err)
	}
	if !reflect.DeepEqual(set, unset) {
		t.Errorf("with every line active: %+v\n              unset: %+v", set, unset)
	}
	for _, v := range config.Variables() {
		if !named[v.Name] && v.Values != "must be empty" && v.Group != byHand {
			t.Errorf("%s is not in the file", v.Name)
		}
	}
	if len(named) < 30 {
		t.Errorf("only %d settings were found; the test sees too little", len(named))
	}
}

func testManPage(t *testing.T, commands []command) {
	text := manPage(commands)
	for _, v := range config.Variables() {
		if !strings.Contains(text, ".B "+v.Name+"\n") {
			t.Errorf("%s is not in the man page", v.Name)
		}
	}
	cmd := shell(t, "groff", "groff-base", "-man", "-Tutf8", "-ww", "-z")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("groff: %v\n%s", err, out)
	}
}

// shell returns a command that other packages provide.
func shell(t *testing.T, name, debianPackage string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil && os.Getenv("UNITMETER_TEST_NO_SKIP") == "" {
		t.Skipf("%s is not here; install it with: apt-get install %s", name, debianPackage)
	}
	if err != nil {
		t.Fatalf("%v; install it with: apt-get install %s", err, debianPackage)
	}
	return exec.Command(path, args...)
}

// Each shell is asked what it offers at the end of a command line.
func testCompletions(t *testing.T, commands []command) {
	dir := t.TempDir()
	systemctl := "#!/bin/sh\nprintf '%s\\n' 'nats.service loaded active running NATS' 'dev-disk\\x2d1.swap loaded active active Swap'\n"
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(systemctl), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"bash": bash(commands), "_unitmeter": zsh(commands), "fish": fish(commands)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run := func(t *testing.T, cmd *exec.Cmd) []string {
		t.Helper()
		cmd.Env = []string{"PATH=" + dir + ":/usr/bin:/bin", "HOME=" + dir, "TERM=dumb", "LANG=C.UTF-8"}
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
		var words []string
		for line := range strings.Lines(string(out)) {
			word, _, _ := strings.Cut(strings.TrimRight(line, "\r\n"), "\t")
			words = append(words, strings.TrimSpace(word))
		}
		return words
	}
	shells := map[string]func(t *testing.T, line ...string) []string{
		"bash": func(t *testing.T, line ...string) []string {
			script := `source ./bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _unitmeter; printf '%s\n' "${COMPREPLY[@]}"`
			return run(t, shell(t, "bash", "bash", append([]string{"--norc", "-c", script, "bash"}, line...)...))
		},
		"fish": func(t *testing.T, line ...string) []string {
			return run(t, shell(t, "fish", "fish", "--no-config", "-c", `source ./fish; complete -C "$argv"`, strings.Join(line, " ")))
		},
		"zsh": func(t *testing.T, line ...string) []string {
			// zsh completes at a terminal only, so one is made.
			script := `zmodload zsh/zpty; zpty z zsh -f
zpty -w z 'PS1= RPS1= ; unsetopt zle_bracketed_paste; fpath=('$PWD' $fpath); autoload -Uz compinit; compinit -u -d '$PWD'/dump'
zpty -w z 'compadd() { local -a d; builtin compadd -O d "$@"; print -rl -- "WORD "$^d; builtin compadd "$@" }'
zpty -w z 'show() { _main_complete; compstate[list]= ; compstate[insert]= ; print END }; zle -C show complete-word show; bindkey "^I" show'
zpty -w z 'print READY'; zpty -r z out '*READY*READY*'
zpty -w -n z "$1"$'\t'; zpty -r z out '*END*'
print -r -- "$out" | sed -n 's/^.*WORD //p'`
			return run(t, shell(t, "zsh", "zsh", "-f", "-c", script, "zsh", strings.Join(line, " ")))
		},
	}
	for name, complete := range shells {
		t.Run(name, func(t *testing.T) {
			offered := complete(t, "unitmeter", "")
			for _, c := range commands {
				if !slices.Contains(offered, c.name) {
					t.Errorf("%s is not offered: %q", c.name, offered)
				}
			}
			if got := complete(t, "unitmeter", "help", "env"); !slices.Contains(got, "environment") {
				t.Errorf("after help: %q", got)
			}
			if got := complete(t, "unitmeter", "once", "--"); !slices.Contains(got, "--interval") || !slices.Contains(got, "--json") {
				t.Errorf("flags of once: %q", got)
			}
			units := complete(t, "unitmeter", "once", "")
			if !slices.Contains(units, "nats.service") || !slices.ContainsFunc(units, func(u string) bool { return strings.HasPrefix(u, `dev-disk\`) }) {
				t.Errorf("units after once: %q", units)
			}
		})
	}
}
