package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// health asks components whether they are ready. Each method waits until the answer is yes or ctx ends.
type health struct {
	l      layout
	s      settings
	server *http.Client
	local  *http.Client
	etcdAt *http.Client
}

const (
	probeEvery   = 100 * time.Millisecond
	probeTimeout = 2 * time.Second
)

func newHealth(l layout, s settings) (*health, error) {
	pem, err := os.ReadFile(l.pki("ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate: restore it from a backup", l.pki("ca.crt"))
	}
	socket := filepath.Join(l.runDir(), etcdSocket)
	dialEtcd := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialUnix(ctx, socket)
	}
	return &health{
		l: l, s: s,
		server: &http.Client{Timeout: probeTimeout, Transport: &http.Transport{
			DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots}}},
		// Controller-manager and scheduler make a certificate for themselves at each start; on the loopback
		// interface, and with nothing but a yes to be read, nobody's identity depends on it.
		local: &http.Client{Timeout: probeTimeout, Transport: &http.Transport{
			DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}},
		etcdAt: &http.Client{Timeout: probeTimeout, Transport: &http.Transport{
			DisableKeepAlives: true, DialContext: dialEtcd}},
	}, nil
}

// dialUnix connects to a socket whatever the length of its path: the kernel takes 107 bytes, so a deep path is reached
// through an open directory.
func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var dialer net.Dialer
	return dialer.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)))
}

func (h *health) etcd(ctx context.Context) error {
	return await(ctx, h.etcdAt, "http://etcd/health")
}

func (h *health) apiserver(ctx context.Context) error {
	return await(ctx, h.server, h.s.server()+"/readyz")
}

func (h *health) component(port int) func(context.Context) error {
	return func(ctx context.Context) error {
		return await(ctx, h.local, fmt.Sprintf("https://127.0.0.1:%d/healthz", port))
	}
}

func await(ctx context.Context, client *http.Client, url string) error {
	var last error
	for {
		if last = probe(ctx, client, url); last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return last
		case <-time.After(probeEvery):
		}
	}
}

func probe(ctx context.Context, client *http.Client, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, io.LimitReader(response.Body, 1<<16))
	err = errors.Join(err, response.Body.Close())
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, response.Status)
	}
	return err
}
