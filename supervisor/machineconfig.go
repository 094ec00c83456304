package main

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"sort"
	"strconv"
	"strings"
	"time"
)

// registry is how a host speaks to one image registry.
type registry struct {
	host               string
	plainHTTP          bool
	ca                 string
	username, password string
}

// parseRegistries reads every `--registry` and reports all that is wrong.
func parseRegistries(arguments []string) ([]registry, error) {
	var all []registry
	var problems []error
	for _, argument := range arguments {
		parsed, err := parseRegistry(argument)
		if err != nil {
			problems = append(problems, fmt.Errorf("--registry %s: %w", argument, err))
			continue
		}
		all = append(all, parsed)
	}
	sort.Slice(all, func(a, b int) bool { return all[a].host < all[b].host })
	for i := 1; i < len(all); i++ {
		if all[i].host == all[i-1].host {
			problems = append(problems, fmt.Errorf("--registry %s is there twice: put all its settings into one, with commas", all[i].host))
		}
	}
	return all, errors.Join(problems...)
}

func parseRegistry(argument string) (registry, error) {
	host, rest, found := strings.Cut(argument, "=")
	parsed := registry{host: host}
	if !found {
		return parsed, errors.New("say how to speak to it, such as HOST:PORT=plain-http")
	}
	if at, err := url.Parse("//" + host); err != nil || at.Host != host || host == "" {
		return parsed, fmt.Errorf("%q is not a host or host:port as it stands in image names", host)
	}
	for setting := range strings.SplitSeq(rest, ",") {
		key, value, _ := strings.Cut(setting, "=")
		var err error
		switch key {
		case "plain-http":
			parsed.plainHTTP = true
		case "ca":
			parsed.ca, err = readSetting(value)
		case "username":
			parsed.username = value
		case "password-file":
			parsed.password, err = readSetting(value)
			parsed.password = strings.TrimRight(parsed.password, "\r\n")
		default:
			err = fmt.Errorf("there is no setting %q: plain-http, ca=FILE, username=NAME, password-file=FILE", key)
		}
		if err != nil {
			return parsed, err
		}
	}
	if (parsed.username == "") != (parsed.password == "") {
		return parsed, errors.New("username and password-file go together")
	}
	return parsed, nil
}

func readSetting(path string) (string, error) {
	text, err := os.ReadFile(path)
	return string(text), err
}

// machineConfig is a complete machine.yaml. The host's name, and addresses where there is no DHCP, are for the reader
// to add.
func (j joining) machineConfig(registries []registry) string {
	var text strings.Builder
	good := "has no end"
	if !j.expires.IsZero() {
		good = "is good until " + j.expires.Format(time.RFC3339)
	}
	fmt.Fprintf(&text, `# Machine config of an Atoll host. The token %s.
# `+"`atollctl config explain`"+` tells what else can be set, such as hostname and static addresses.
apiVersion: atoll.dev/v1
kind: Machine
join:
  server: %s
  token: %s
  caPins:
    - %s
`, good, quote(j.server), quote(j.token), quote(j.pin))
	if len(registries) > 0 {
		text.WriteString("registries:\n")
	}
	for _, r := range registries {
		fmt.Fprintf(&text, "  %s:\n    plainHttp: %t\n", quote(r.host), r.plainHTTP)
		for _, field := range [][2]string{{"caPem", r.ca}, {"username", r.username}, {"password", r.password}} {
			if field[1] != "" {
				fmt.Fprintf(&text, "    %s: %s\n", field[0], quote(field[1]))
			}
		}
	}
	return text.String()
}

// quote writes a YAML string in double quotes; Go's escapes for ASCII are YAML's too.
func quote(text string) string { return strconv.QuoteToASCII(text) }
