package main

import (
	"fmt"
	"strings"
)

const written = `# Written by packaging/generate; "go generate ./packaging/..." renews it.` + "\n"

// listUnits prints the names of all units that can be metered.
const listUnits = "systemctl list-units --all --plain --no-legend --no-pager --type=service,scope,socket,mount,swap,slice 2>/dev/null"

func names(commands []command) string {
	var all []string
	for _, c := range commands {
		all = append(all, c.name)
	}
	return strings.Join(all, " ")
}

func bash(commands []command) string {
	var b strings.Builder
	b.WriteString("# bash completion for unitmeter\n" + written)
	b.WriteString(`_unitmeter() {
	local current=${COMP_WORDS[COMP_CWORD]} words units name
	COMPREPLY=()
	case $COMP_CWORD,${COMP_WORDS[1]} in
`)
	fmt.Fprintf(&b, "\t1,*) words='%s' ;;\n", names(commands))
	fmt.Fprintf(&b, "\t2,help) words='%s environment' ;;\n", names(commands))
	for _, c := range commands {
		var flags []string
		for _, f := range c.flags {
			flags = append(flags, f.name)
		}
		if len(flags) > 0 || c.units() {
			fmt.Fprintf(&b, "\t*,%s) words='%s' units=%s ;;\n", c.name, strings.Join(flags, " "), yes(c.units()))
		}
	}
	b.WriteString(`	esac
	for name in $words; do
		[[ $name == "$current"* ]] && COMPREPLY+=("$name")
	done
	[[ $units ]] || return 0
	# Names of units may have backslashes, so compgen -W is not for them.
	while read -r name _; do
		[[ $name == "$current"* ]] && COMPREPLY+=("$(printf %q "$name")")
	done < <(` + listUnits + `)
	return 0
}
complete -F _unitmeter unitmeter
`)
	return b.String()
}

func yes(b bool) string {
	if b {
		return "1"
	}
	return ""
}

func zsh(commands []command) string {
	var b strings.Builder
	b.WriteString("#compdef unitmeter\n" + written)
	b.WriteString("_unitmeter() {\n\tlocal -a commands\n\tcommands=(\n")
	for _, c := range commands {
		fmt.Fprintf(&b, "\t\t'%s:%s'\n", c.name, quoted(c.summary))
	}
	b.WriteString(`	)
	if (( CURRENT == 2 )); then
		_describe command commands
		return
	fi
	case $words[2] in
	help)
		commands+=('environment:the variables that configure unitmeter')
		_describe topic commands ;;
`)
	for _, c := range commands {
		if len(c.flags) == 0 && !c.units() {
			continue
		}
		// What _arguments sees must begin with the subcommand.
		fmt.Fprintf(&b, "\t%s)\n\t\tshift words; (( CURRENT-- ))\n\t\t_arguments", c.name)
		for _, f := range c.flags {
			value := ""
			if f.value != "" {
				value = ":" + f.value
			}
			meaning := strings.NewReplacer("[", `\[`, "]", `\]`, ":", `\:`).Replace(quoted(f.meaning))
			fmt.Fprintf(&b, " \\\n\t\t\t'%s[%s]%s'", f.name, meaning, value)
		}
		if c.units() {
			b.WriteString(" \\\n\t\t\t'*:unit:_unitmeter_units'")
		}
		b.WriteString(" ;;\n")
	}
	b.WriteString(`	esac
}
_unitmeter_units() {
	local -a units
	units=(${${(f)"$(` + listUnits + `)"}%% *})
	compadd -a units
}
_unitmeter "$@"
`)
	return b.String()
}

// quoted makes text fit for single quotes.
func quoted(text string) string { return strings.ReplaceAll(text, `'`, `'\''`) }

func fish(commands []command) string {
	var b strings.Builder
	b.WriteString("# fish completion for unitmeter\n" + written)
	fishQuoted := strings.NewReplacer(`\`, `\\`, `'`, `\'`)
	b.WriteString("complete -c unitmeter -f\n")
	for _, c := range commands {
		fmt.Fprintf(&b, "complete -c unitmeter -n __fish_use_subcommand -a %s -d '%s'\n", c.name, fishQuoted.Replace(c.summary))
	}
	fmt.Fprintf(&b, "complete -c unitmeter -n '__fish_seen_subcommand_from help' -a '%s environment'\n", names(commands))
	for _, c := range commands {
		seen := "'__fish_seen_subcommand_from " + c.name + "'"
		for _, f := range c.flags {
			value := ""
			if f.value != "" {
				value = " -x"
			}
			fmt.Fprintf(&b, "complete -c unitmeter -n %s %s%s -d '%s'\n", seen, strings.NewReplacer("--", "-l ", "-", "-s ").Replace(f.name[:2])+f.name[2:], value, fishQuoted.Replace(f.meaning))
		}
		if c.units() {
			fmt.Fprintf(&b, "complete -c unitmeter -n %s -a '(%s | string match -r \"^\\S+\")'\n", seen, listUnits)
		}
	}
	return b.String()
}
