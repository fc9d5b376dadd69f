package config

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"

	"golang.org/x/net/http/httpproxy"
)

// Values that can be read, and say something else than was meant. Where nobody can
// have meant it they are problems, and otherwise warnings.

// leftover finds what a shell would have taken out of a value. systemd's
// EnvironmentFile= and docker's --env-file leave it in: they have no comments
// behind a value, and expand nothing.
func leftover(text string) (reason, hint string) {
	switch {
	case strings.Contains(text, "${") || strings.Contains(text, "$("):
		return "contains ${NAME} or $(command), which nothing expands here", "write the value itself"
	case hasComment(text):
		return "has a comment behind it, which is part of the value here", "put the comment on a line of its own"
	}
	return "", ""
}

// hasComment finds a # that begins a word or stands alone. systemd takes the space
// between a quoted value and its comment away.
func hasComment(text string) bool {
	before := ' '
	for i, r := range text {
		if r == '#' && (unicode.IsSpace(before) || strings.HasPrefix(text[i+1:], " ")) {
			return true
		}
		before = r
	}
	return false
}

// hasName finds $NAME.
func hasName(text string) bool {
	words := strings.FieldsFunc(text, func(r rune) bool { return r != '$' && r != '_' && !isAlnum(r) })
	return slices.ContainsFunc(words, func(word string) bool {
		name, ok := strings.CutPrefix(word, "$")
		return ok && name != "" && strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789") == "" && (name[0] < '0' || name[0] > '9')
	})
}

// itemLeftover is leftover for a value in a list, where quotes do not hold a comma
// either. What is meant can be written with %.
func itemLeftover(text string) (reason, hint string) {
	if reason, _ := leftover(text); reason != "" {
		return reason, "write the value itself, and a # or $ that is meant as %23 or %24"
	}
	if text != "" && (strings.ContainsRune(`"'`, rune(text[0])) || strings.ContainsRune(`"'`, rune(text[len(text)-1]))) {
		return "has quotes, which are part of the value here", "remove them; write a quote that is meant as %22 or %27, and a comma as %2C"
	}
	return "", ""
}

// checkPath warns of an endpoint for HTTP whose path is that of the other
// variable: /v1/metrics is added to the one, and not to the other.
func (l *loader) checkPath(s setting, base bool, path string) {
	const metrics = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
	trimmed := strings.TrimRight(path, "/")
	signal := ""
	for _, of := range []string{"/v1/metrics", "/v1/traces", "/v1/logs"} {
		if strings.HasSuffix(trimmed, of) {
			signal = of
		}
	}
	switch {
	case base && signal != "":
		l.warn(fmt.Sprintf("%s ends in %s, and /v1/metrics is added to that: remove it, or set %s to the whole URL", s.name, signal, metrics))
	case !base && signal != "" && signal != "/v1/metrics":
		l.warn(fmt.Sprintf("%s ends in %s, which is not for metrics: write /v1/metrics", s.name, signal))
	case !base && trimmed == "":
		l.warn(fmt.Sprintf("%s has no path, and is used as it is: add /v1/metrics, or set OTEL_EXPORTER_OTLP_ENDPOINT", s.name))
	}
}

// checkSeconds warns of times so short that they are seconds, as in the SDKs that
// read some of these variables as such.
func (l *loader) checkSeconds() {
	for _, name := range []string{"OTEL_METRIC_EXPORT_INTERVAL", "OTEL_METRIC_EXPORT_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"} {
		s, set := l.given[name]
		if d, err := time.ParseDuration(s.text + "ms"); set && err == nil && d < time.Second {
			l.warn(fmt.Sprintf("%s is in milliseconds, and %s is %s: for %s seconds write %s000", s.name, s.text, d, s.text, s.text))
		}
	}
}

// checkProxies looks at the proxy that requests would go through. One that
// net/http cannot read is passed over without a word, and gRPC takes every proxy
// for one that speaks HTTP without TLS.
func (l *loader) checkProxies(endpoint string) {
	secure, plain := l.eitherCase("HTTPS_PROXY"), l.eitherCase("HTTP_PROXY")
	for _, s := range []setting{secure, plain} {
		_, err := url.Parse(s.text)
		_, bare := url.Parse("http://" + s.text) // "host:port" is allowed
		if err != nil && bare != nil {
			l.warn(s.name + " is no URL, so that no proxy is used: write it as http://host:port")
		}
	}
	usable, hint := []string{"http", "https", "socks5", "socks5h"}, ""
	if l.cfg.OTLP.Protocol == "grpc" {
		if strings.HasPrefix(endpoint, "unix") {
			return
		}
		endpoint = "https://" + endpoint[strings.LastIndexByte(endpoint, '/')+1:] // as gRPC asks for it
		usable, hint = usable[:1], "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, "
	}
	target, err := url.Parse(endpoint)
	if err != nil {
		return
	}
	rules := httpproxy.Config{HTTPSProxy: secure.text, HTTPProxy: plain.text, NoProxy: l.eitherCase("NO_PROXY").text}
	proxy, err := rules.ProxyFunc()(target)
	if err != nil || proxy == nil {
		return
	}
	s := plain
	if target.Scheme == "https" {
		s = secure
	}
	if l.cfg.OTLP.ProxyVariable = s.name; slices.Contains(usable, proxy.Scheme) {
		return
	}
	l.bad(s, fmt.Sprintf("%s cannot go through a proxy of the kind %s", l.cfg.OTLP.Protocol, shorten(proxy.Scheme)),
		hint+"name a proxy of the kind "+strings.Join(usable, ", ")+", or put the endpoint's host into NO_PROXY")
}

// eitherCase looks up one of the variables for proxies, which may be in lower case.
func (l *loader) eitherCase(name string) setting {
	if lower := strings.ToLower(name); l.env[name] == "" && l.env[lower] != "" {
		name = lower
	}
	return setting{name: name, text: l.env[name], shown: redactURL(l.env[name])}
}
