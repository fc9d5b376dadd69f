package main

import (
	"fmt"
	"reflect"
	"strings"

	"github.com/unitmeter/unitmeter/config"
)

// byHand is the group of variables that are not for a person to set.
const byHand = "Read from the system"

// environmentFile has each variable that may be set, as a comment.
func environmentFile() string {
	var b strings.Builder
	b.WriteString(`# Settings of unitmeter.service; unitmeter(8) has them too. None is needed where
# an OpenTelemetry Collector listens on this host. Remove the # in front of a
# variable, then: systemctl restart unitmeter
#
# What stands behind = is the default. Put values with spaces into double quotes.
# Secrets are better kept out of here: see
# /usr/share/doc/unitmeter/examples/credentials.conf
`)
	group := ""
	for _, v := range config.Variables() {
		if v.Values == "must be empty" || v.Group == byHand && v.Name != "DBUS_SYSTEM_BUS_ADDRESS" {
			continue
		}
		if v.Group != group {
			group = v.Group
			fmt.Fprintf(&b, "\n\n### %s\n", group)
		}
		b.WriteByte('\n')
		comment(&b, v.Meaning)
		comment(&b, "Values: "+v.Values)
		if v.Default != "" && !literal(v) {
			comment(&b, "Default: "+v.Default)
		}
		if v.Specific != "" {
			comment(&b, "For metrics only: "+v.Specific)
		}
		value := ""
		if literal(v) {
			value = v.Default
		}
		if strings.ContainsAny(value, " \\") {
			value = `"` + strings.ReplaceAll(value, `\`, `\\`) + `"`
		}
		fmt.Fprintf(&b, "#%s=%s\n", v.Name, value)
	}
	return b.String()
}

// literal reports whether setting the default is the same as setting nothing:
// some defaults only describe what happens without a value.
func literal(v config.Variable) bool {
	const state = "STATE_DIRECTORY=/var/lib/unitmeter"
	set, err := config.Load([]string{state, v.Name + "=" + v.Default})
	unset, _ := config.Load([]string{state}) // nothing is wrong with nothing
	return v.Default != "" && err == nil && reflect.DeepEqual(set, unset)
}

// comment writes text as lines of at most 80 characters.
func comment(b *strings.Builder, text string) {
	line := "#"
	for word := range strings.FieldsSeq(text) {
		if len(line)+1+len(word) > 80 && line != "#" {
			b.WriteString(line + "\n")
			line = "#"
		}
		line += " " + word
	}
	b.WriteString(line + "\n")
}

// manPage is man(7) source. It has no date and no version, so that it changes
// only with the program.
func manPage(commands []command) string {
	var b strings.Builder
	b.WriteString(`.\" Written by packaging/generate; "go generate ./packaging/..." renews it.
.TH UNITMETER 8 "" unitmeter "System Administration"
.ad l
.SH NAME
unitmeter \- network traffic of every systemd unit, as OpenTelemetry metrics
.SH SYNOPSIS
`)
	for i, c := range commands {
		if i > 0 {
			b.WriteString(".br\n")
		}
		fmt.Fprintf(&b, ".B unitmeter %s\n", roff(c.name))
		if c.arguments != "" {
			b.WriteString(roff(c.arguments) + "\n")
		}
	}
	b.WriteString(`.SH DESCRIPTION
unitmeter reads systemd's IP accounting over D\-Bus, for each unit that has
.BR IPAccounting=yes ,
and sends what the units received and sent to an OpenTelemetry Collector, or to
anything else that accepts OTLP. With
.BR UNITMETER_SOURCE=ebpf
it counts every unit with its own eBPF program instead.
.PP
Bytes are bytes of IP packets, headers included. Packets are counted before
segmentation offload splits them, so there are more of them on the wire. Forwarded
traffic and AF_PACKET sockets are not counted; sockets of the kernel are counted by
eBPF only. Traffic between two units of this host counts for both.
.SH COMMANDS
`)
	for _, c := range commands {
		fmt.Fprintf(&b, ".SS \"unitmeter %s\"\n%s.\n", strings.TrimSpace(c.name+" "+roff(c.arguments)), roff(upper(c.summary)))
		for _, f := range c.flags {
			fmt.Fprintf(&b, ".TP\n.B %s\n%s.\n", roff(strings.TrimSpace(f.name+" "+f.value)), roff(upper(f.meaning)))
		}
	}
	b.WriteString(`.SH EXIT STATUS
.TP
.B 0
Done.
.TP
.B 1
The work could not be done.
.TP
.B 2
The command line or the environment is wrong.
.SH ENVIRONMENT
An empty variable is the same as none. A bad value, and an UNITMETER_ variable
that does not exist, keep unitmeter from starting.
`)
	group := ""
	for _, v := range config.Variables() {
		if v.Group != group {
			group = v.Group
			fmt.Fprintf(&b, ".SS \"%s\"\n", roff(group))
		}
		fmt.Fprintf(&b, ".TP\n.B %s\n", roff(v.Name))
		if v.Specific != "" {
			fmt.Fprintf(&b, ".TQ\n.B %s\n", roff(v.Specific))
		}
		fmt.Fprintf(&b, "%s\n.br\nValues: %s\n", roff(v.Meaning), roff(v.Values))
		if v.Default != "" {
			fmt.Fprintf(&b, ".br\nDefault: %s\n", roff(v.Default))
		}
	}
	b.WriteString(`.SH FILES
.TP
.I /etc/unitmeter/unitmeter.env
The environment of unitmeter.service.
.TP
.I /var/lib/unitmeter
Totals, unsent requests and history of the service. Purging the Debian package
removes it.
.TP
.I /usr/share/doc/unitmeter/examples
Optional drop-ins for the service, each with its price: secrets for the endpoint,
the last bytes of short-lived units, and counting by eBPF.
.SH SEE ALSO
.BR systemd.resource\-control (5),
.BR systemctl (1),
.BR journalctl (1)
.PP
https://github.com/unitmeter/unitmeter
`)
	return b.String()
}

// roff escapes text for man(7), where a line may break between the sets of a pattern.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "][", `]\:[`, `-`, `\-`, `"`, `\(dq`, `'`, `\(aq`, `~`, `\(ti`, `^`, `\(ha`, "`", `\(ga`).Replace(text)
	if strings.HasPrefix(text, ".") {
		text = `\&` + text
	}
	return text
}

func upper(text string) string {
	if text == "" {
		return text
	}
	return strings.ToUpper(text[:1]) + text[1:]
}
