package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// layout names the files below the data directory.
type layout struct{ root string }

func (l layout) pki(name string) string        { return filepath.Join(l.root, "pki", name) }
func (l layout) kubeconfig(name string) string { return filepath.Join(l.root, "kubeconfig", name) }
func (l layout) log(name string) string        { return filepath.Join(l.root, "logs", name+".log") }
func (l layout) runDir() string                { return filepath.Join(l.root, "run") }
func (l layout) etcd() string                  { return filepath.Join(l.root, "etcd") }
func (l layout) adminKubeconfig() string       { return filepath.Join(l.root, "admin.kubeconfig") }
func (l layout) settings() string              { return filepath.Join(l.root, "supervisor.json") }
func (l layout) lock() string                  { return filepath.Join(l.root, "lock") }

// make creates the directories, for the owner alone.
func (l layout) make() error {
	for _, dir := range []string{l.root, l.pki(""), l.kubeconfig(""), filepath.Dir(l.log("")), l.runDir(), l.etcd()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("cannot make the data directory: %w: choose another with --data", err)
		}
	}
	return os.Chmod(l.root, 0o700)
}

// settings are what the first start was given; what other commands need and what may not change is kept.
type settings struct {
	Address     string   `json:"address"`
	Port        int      `json:"port"`
	ServiceCIDR string   `json:"serviceCIDR"`
	ClusterCIDR string   `json:"clusterCIDR"`
	SANs        []string `json:"sans,omitempty"`
	// HostCertificates is for this run alone: certificates that are signed keep the life they have.
	HostCertificates time.Duration `json:"-"`
}

// server is the URL of the API server.
func (s settings) server() string {
	return "https://" + net.JoinHostPort(s.Address, strconv.Itoa(s.Port))
}

func (s settings) check() error {
	var problems []error
	if net.ParseIP(s.Address) == nil {
		problems = append(problems, fmt.Errorf("--address %q is not an IP address: give one of this machine's", s.Address))
	}
	if s.Port < 1 || s.Port > 65535 {
		problems = append(problems, fmt.Errorf("--port %d is not between 1 and 65535", s.Port))
	}
	if s.HostCertificates < leastHostCertificates {
		problems = append(problems, fmt.Errorf("--host-certificates %s is shorter than %s: give a duration such as 720h", s.HostCertificates, leastHostCertificates))
	}
	service, err := parseNet("--service-cidr", s.ServiceCIDR)
	problems = append(problems, err)
	cluster, err := parseNet("--cluster-cidr", s.ClusterCIDR)
	problems = append(problems, err)
	if service != nil && cluster != nil && (service.Contains(cluster.IP) || cluster.Contains(service.IP)) {
		problems = append(problems, fmt.Errorf("--service-cidr %s and --cluster-cidr %s overlap: choose others", service, cluster))
	}
	return errors.Join(problems...)
}

func parseNet(flag, text string) (*net.IPNet, error) {
	ip, parsed, err := net.ParseCIDR(text)
	if err != nil {
		return nil, fmt.Errorf("%s %q is not a network such as 10.96.0.0/16", flag, text)
	}
	if !ip.Equal(parsed.IP) {
		return nil, fmt.Errorf("%s %s has bits set after its prefix: write %s", flag, text, parsed)
	}
	return parsed, nil
}

// load reads what an earlier start has kept; os.ErrNotExist when there was none.
func (l layout) load() (settings, error) {
	var kept settings
	text, err := os.ReadFile(l.settings())
	if err != nil {
		return kept, err
	}
	if err := json.Unmarshal(text, &kept); err != nil {
		return kept, fmt.Errorf("cannot read %s: %w", l.settings(), err)
	}
	return kept, nil
}

// loadStarted is load for the commands that need a Supervisor that has been started once.
func (l layout) loadStarted() (settings, error) {
	kept, err := l.load()
	if errors.Is(err, os.ErrNotExist) {
		return kept, fmt.Errorf("there is no Supervisor in %s: start one with `atoll-supervisor up --data %s`, or say with --data where it is", l.root, l.root)
	}
	return kept, err
}

// keep stores the settings; the network of services and pods cannot change once objects have addresses of it.
func (l layout) keep(wanted settings) error {
	kept, err := l.load()
	if err == nil && (kept.ServiceCIDR != wanted.ServiceCIDR || kept.ClusterCIDR != wanted.ClusterCIDR) {
		return fmt.Errorf("the cluster in %s has --service-cidr %s --cluster-cidr %s, which cannot be changed: leave them, or start with an empty --data",
			l.root, kept.ServiceCIDR, kept.ClusterCIDR)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	text, err := json.MarshalIndent(wanted, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(l.settings(), append(text, '\n'), 0o600)
}

// writeFile replaces a file atomically.
func writeFile(path string, content []byte, mode os.FileMode) error {
	partial, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	defer os.Remove(partial.Name())
	_, err = partial.Write(content)
	err = errors.Join(err, partial.Chmod(mode), partial.Sync(), partial.Close())
	if err == nil {
		err = os.Rename(partial.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return nil
}
