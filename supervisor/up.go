package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// requestTimeout bounds one request of the Supervisor to its API server.
const requestTimeout = 15 * time.Second

// Certificates of hosts: a year as everywhere, and not so short that a host is busy with nothing else.
const (
	defaultHostCertificates = 365 * 24 * time.Hour
	leastHostCertificates   = time.Minute
)

func upCommand() *cobra.Command {
	var data string
	var wanted settings
	command := &cobra.Command{
		Use:   "up",
		Short: "Run the control plane until it is told to stop",
		Long: `Run etcd, the API server, the controller-manager, the scheduler and the approver of node certificates, each as
a process of its own that is started again when it ends.

The first start makes keys, certificates, and the objects that let hosts join; later starts use them again, so the
same --data is the same cluster. Everything listens on --address or on the loopback interface; etcd on a socket that
only the owner of --data can reach.

    atoll-supervisor up --data ./lab --address 10.0.0.1

Stop it with Ctrl-C or SIGTERM; a second Ctrl-C stops it at once.`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			if wanted.Address == "" {
				return errors.New("this machine has no address on a network that can be guessed: give one of its addresses with --address")
			}
			if err := wanted.check(); err != nil {
				return err
			}
			root, err := filepath.Abs(data)
			if err != nil {
				return err
			}
			return up(layout{root}, wanted)
		},
	}
	dataFlag(command, &data)
	flags := command.Flags()
	flags.StringVar(&wanted.Address, "address", outwardAddress(), "address of this machine that hosts and clients reach")
	flags.IntVar(&wanted.Port, "port", 6443, "port of the API server")
	flags.StringVar(&wanted.ServiceCIDR, "service-cidr", "10.96.0.0/16", "network of services; kept from the first start")
	flags.StringVar(&wanted.ClusterCIDR, "cluster-cidr", "10.244.0.0/16", "network of pods, of which each node gets a part; kept from the first start")
	flags.DurationVar(&wanted.HostCertificates, "host-certificates", defaultHostCertificates, "how long the certificates of hosts are good for; hosts renew theirs when four fifths of it are over")
	flags.StringSliceVar(&wanted.SANs, "san", nil, "another name or address of the API server for its certificate; may be repeated")
	return command
}

// outwardAddress is the address this machine would use towards others. Nothing is sent: it only asks the kernel.
func outwardAddress() string {
	connection, err := net.Dial("udp", "192.0.2.1:9")
	if err != nil {
		return ""
	}
	defer connection.Close()
	return connection.LocalAddr().(*net.UDPAddr).IP.String()
}

// up is the whole life of the control plane.
func up(l layout, s settings) error {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{ReplaceAttr: withoutTime})))
	if err := l.make(); err != nil {
		return err
	}
	unlock, err := lock(l.lock())
	if err != nil {
		return err
	}
	defer unlock()
	if err := checkListen(s); err != nil {
		return err
	}
	if err := l.keep(s); err != nil {
		return err
	}
	made, err := ensureCertificates(l, s, time.Now())
	if err != nil {
		return err
	}
	if len(made) > 0 {
		slog.Info("certificates made", "names", made)
	}
	if err := writeKubeconfigs(l, s); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return run(ctx, stop, l, s)
}

func withoutTime(_ []string, attribute slog.Attr) slog.Attr {
	if attribute.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return attribute
}

// lock makes sure that a data directory has one Supervisor.
func lock(path string) (func(), error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("another Supervisor runs on %s: stop it, or choose another --data", filepath.Dir(path)), file.Close())
	}
	return func() { _ = file.Close() }, nil // closing gives the lock back; the process ends next
}

// checkListen finds out at once what the API server would otherwise say in its log, again and again.
func checkListen(s settings) error {
	listener, err := net.Listen("tcp", net.JoinHostPort(s.Address, strconv.Itoa(s.Port)))
	if err != nil {
		return fmt.Errorf("cannot serve on %s: %w: --address must be an address of this machine, and --port free", s.server(), err)
	}
	return listener.Close()
}

// run starts the components in order, waits for ctx, and stops them in the opposite order.
func run(ctx context.Context, restoreSignals func(), l layout, s settings) error {
	spawner := newSpawner()
	started := time.Now()
	health, err := newHealth(l, s)
	if err != nil {
		return err
	}
	plan, err := planChildren(l, s, health)
	if err != nil {
		return err
	}
	var etcd, apiserver *runner
	var others []*runner
	// A second signal while stopping has its default effect, and the kernel kills the children.
	defer func() {
		restoreSignals()
		stopAll(others...)
		stopAll(apiserver)
		stopAll(etcd)
		slog.Info("stopped")
	}()
	if etcd, err = startRunner(ctx, plan.etcd, spawner, l); err != nil {
		return ended(ctx, err)
	}
	if apiserver, err = startRunner(ctx, plan.apiserver, spawner, l); err != nil {
		return ended(ctx, err)
	}
	if err := ensureObjects(ctx, l, s); err != nil {
		return ended(ctx, err)
	}
	for _, c := range plan.others {
		r, err := startRunner(ctx, c, spawner, l)
		others = append(others, r)
		if err != nil {
			return ended(ctx, err)
		}
	}
	slog.Info("Supervisor ready", "server", s.server(), "after", time.Since(started).Round(100*time.Millisecond))
	slog.Info("join a host with: atoll-supervisor token create --machine-config --data " + l.root)
	renewUntil(ctx, l, s)
	slog.Info("stopping")
	return nil
}

// ended turns an error that only says that we were told to stop into none.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// renewUntil keeps the Supervisor's own certificates fresh until ctx ends.
func renewUntil(ctx context.Context, l layout, s settings) {
	ticker := time.NewTicker(renewEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			made, err := ensureCertificates(l, s, now)
			if err == nil && len(made) > 0 {
				slog.Info("certificates renewed", "names", made)
				err = writeAdminKubeconfig(l, s)
			}
			if err != nil {
				slog.Error("cannot renew certificates, trying again later", "why", err, "in", renewEvery)
			}
		}
	}
}

// plan is every child of `up`.
type plan struct {
	etcd, apiserver child
	others          []child
}

func planChildren(l layout, s settings, health *health) (plan, error) {
	managerPort, err := freePort(10257)
	if err != nil {
		return plan{}, err
	}
	schedulerPort, err := freePort(10259)
	if err != nil {
		return plan{}, err
	}
	return plan{
		etcd: child{
			name: "etcd", args: []string{"etcd", "--data-dir", l.etcd()},
			ready: health.etcd, readyWithin: 60 * time.Second, stopWithin: 6 * time.Second,
		},
		apiserver: child{
			name: "kube-apiserver", args: apiserverArgs(l, s), before: health.etcd,
			ready: health.apiserver, readyWithin: 2 * time.Minute, stopWithin: 12 * time.Second,
		},
		others: []child{
			{
				name: "kube-controller-manager", args: controllerManagerArgs(l, s, managerPort), before: health.apiserver,
				ready: health.component(managerPort), readyWithin: time.Minute, stopWithin: 6 * time.Second,
			},
			{
				name: "kube-scheduler", args: schedulerArgs(l, schedulerPort), before: health.apiserver,
				ready: health.component(schedulerPort), readyWithin: time.Minute, stopWithin: 6 * time.Second,
			},
			{
				name: "csr-approver", args: []string{"csr-approver", "--kubeconfig", l.kubeconfig("csr-approver")},
				before: health.apiserver, stopWithin: 3 * time.Second,
			},
		},
	}, nil
}

// freePort is the usual loopback port of a component, or any free one when another Supervisor has it.
func freePort(usual int) (int, error) {
	for _, port := range []int{usual, 0} {
		listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			free := listener.Addr().(*net.TCPAddr).Port
			return free, listener.Close()
		}
	}
	return 0, errors.New("no free port on 127.0.0.1: is the loopback interface up?")
}

func apiserverArgs(l layout, s settings) []string {
	reconciler := "lease"
	if net.ParseIP(s.Address).IsLoopback() {
		reconciler = "none" // endpoints must not have loopback addresses
	}
	return []string{
		"kube-apiserver",
		"--etcd-servers=unix://" + etcdSocket,
		"--bind-address=" + s.Address,
		"--advertise-address=" + s.Address,
		"--secure-port=" + strconv.Itoa(s.Port),
		"--endpoint-reconciler-type=" + reconciler,
		"--service-cluster-ip-range=" + s.ServiceCIDR,
		"--tls-cert-file=" + l.pki("apiserver.crt"),
		"--tls-private-key-file=" + l.pki("apiserver.key"),
		"--client-ca-file=" + l.pki("ca.crt"),
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--enable-bootstrap-token-auth=true",
		"--anonymous-auth=true",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + l.pki("sa.pub"),
		"--service-account-signing-key-file=" + l.pki("sa.key"),
		"--kubelet-client-certificate=" + l.pki("apiserver-kubelet-client.crt"),
		"--kubelet-client-key=" + l.pki("apiserver-kubelet-client.key"),
		"--kubelet-certificate-authority=" + l.pki("ca.crt"),
		"--kubelet-preferred-address-types=InternalIP",
		"--requestheader-client-ca-file=" + l.pki("front-proxy-ca.crt"),
		"--requestheader-allowed-names=" + userAggregator,
		"--requestheader-username-headers=X-Remote-User",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + l.pki("front-proxy-client.crt"),
		"--proxy-client-key-file=" + l.pki("front-proxy-client.key"),
		"--allow-privileged=true",
		"--shutdown-watch-termination-grace-period=2s", // without it a stop waits for every watch of every node
		"--profiling=false",
	}
}

func controllerManagerArgs(l layout, s settings, port int) []string {
	return []string{
		"kube-controller-manager",
		"--bind-address=127.0.0.1",
		"--secure-port=" + strconv.Itoa(port),
		"--kubeconfig=" + l.kubeconfig("controller-manager"),
		"--authentication-kubeconfig=" + l.kubeconfig("controller-manager"),
		"--authorization-kubeconfig=" + l.kubeconfig("controller-manager"),
		"--use-service-account-credentials=true",
		"--cluster-signing-cert-file=" + l.pki("ca.crt"),
		"--cluster-signing-key-file=" + l.pki("ca.key"),
		"--cluster-signing-duration=" + s.HostCertificates.String(),
		"--root-ca-file=" + l.pki("ca.crt"),
		"--service-account-private-key-file=" + l.pki("sa.key"),
		"--client-ca-file=" + l.pki("ca.crt"),
		"--controllers=*,bootstrapsigner,tokencleaner",
		"--allocate-node-cidrs=true",
		"--cluster-cidr=" + s.ClusterCIDR,
		"--service-cluster-ip-range=" + s.ServiceCIDR,
		"--leader-elect=false",
		"--profiling=false",
	}
}

func schedulerArgs(l layout, port int) []string {
	return []string{
		"kube-scheduler",
		"--bind-address=127.0.0.1",
		"--secure-port=" + strconv.Itoa(port),
		"--kubeconfig=" + l.kubeconfig("scheduler"),
		"--authentication-kubeconfig=" + l.kubeconfig("scheduler"),
		"--authorization-kubeconfig=" + l.kubeconfig("scheduler"),
		"--leader-elect=false",
		"--profiling=false",
	}
}
