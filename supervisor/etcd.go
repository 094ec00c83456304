package main

import (
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// etcdSocket is where etcd listens, relative to the directory it and the API server run in. A relative name fits
// into a socket address however deep the data directory lies; the directory lets in its owner alone, which is the
// authentication.
const etcdSocket = "etcd.sock"

// runEtcd is `etcd --data-dir DIR`: one member that only speaks to clients on its unix socket.
func runEtcd() int {
	flags := flag.NewFlagSet("etcd", flag.ExitOnError)
	dir := flags.String("data-dir", "", "where etcd keeps its data")
	_ = flags.Parse(os.Args[1:]) // ExitOnError
	if err := serveEtcd(*dir); err != nil {
		fmt.Fprintf(os.Stderr, "etcd: %v\n", err)
		return 1
	}
	return 0
}

func serveEtcd(dir string) error {
	if dir == "" {
		return fmt.Errorf("--data-dir is missing: say where the data lies")
	}
	if err := os.Remove(etcdSocket); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("cannot remove the old socket %s: %w", etcdSocket, err)
	}
	syscall.Umask(0o077)
	config := embed.NewConfig()
	config.Name = "supervisor"
	config.Dir = dir
	config.LogLevel = "warn"
	config.ListenPeerUrls = nil // one member has no peers to listen to
	config.InitialCluster = config.InitialClusterFromName(config.Name)
	config.ListenClientUrls = []url.URL{{Scheme: "unix", Host: etcdSocket}}
	config.AdvertiseClientUrls = config.ListenClientUrls
	config.AutoCompactionMode = "periodic"
	config.AutoCompactionRetention = "0" // the API server compacts
	server, err := embed.StartEtcd(config)
	if err != nil {
		return err
	}
	defer server.Close()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(60 * time.Second):
		return fmt.Errorf("not ready after 60 s: is the disk of %s slow or full?", dir)
	case <-stop:
		return nil
	}
	select {
	case <-stop:
		return nil
	case err := <-server.Err():
		return err
	case <-server.Server.StopNotify():
		return fmt.Errorf("stopped by itself")
	}
}
