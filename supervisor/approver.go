package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/workqueue"
)

// The approver of nodes' serving certificates. Upstream leaves this to a person, since who may serve under which
// address is not something the API server can know. Here a node gets a certificate for exactly the addresses its own
// Node object has, and no address that another node has too.

// verdict is what becomes of a request.
type verdict int

const (
	// ignore: not ours to judge.
	ignore verdict = iota
	// approve it.
	approve
	// deny it for good: no change elsewhere can make it right.
	deny
	// wait: the Node object does not bear it out yet.
	wait
)

const (
	approverResync = time.Minute
	waitFirst      = 500 * time.Millisecond
	waitMost       = 30 * time.Second
)

// judge decides on a request from what the API server vouches for (user, groups) and what the nodes are.
func judge(csr *certificatesv1.CertificateSigningRequest, nodes []*corev1.Node) (verdict, string) {
	if csr.Spec.SignerName != signerServing || len(csr.Status.Certificate) > 0 || decided(csr) {
		return ignore, ""
	}
	name, isNode := strings.CutPrefix(csr.Spec.Username, "system:node:")
	if !isNode || name == "" || !slices.Contains(csr.Spec.Groups, "system:nodes") {
		return deny, "only a node may ask for a node's serving certificate"
	}
	request, reason := parseRequest(csr)
	if reason != "" {
		return deny, reason
	}
	if reason := checkForm(csr, request); reason != "" {
		return deny, reason
	}
	return checkAddresses(name, request, nodes)
}

func decided(csr *certificatesv1.CertificateSigningRequest) bool {
	return slices.ContainsFunc(csr.Status.Conditions, func(c certificatesv1.CertificateSigningRequestCondition) bool {
		return c.Type == certificatesv1.CertificateApproved || c.Type == certificatesv1.CertificateDenied
	})
}

func parseRequest(csr *certificatesv1.CertificateSigningRequest) (*x509.CertificateRequest, string) {
	block, _ := pem.Decode(csr.Spec.Request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, "the request is not PEM"
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = request.CheckSignature()
	}
	if err != nil {
		return nil, "the request cannot be parsed: " + err.Error()
	}
	return request, ""
}

// checkForm holds what the signer documents, and that the node asks for itself.
func checkForm(csr *certificatesv1.CertificateSigningRequest, request *x509.CertificateRequest) string {
	switch {
	case request.Subject.CommonName != csr.Spec.Username:
		return fmt.Sprintf("the common name %q is not the node that asks, %q", request.Subject.CommonName, csr.Spec.Username)
	case !slices.Equal(request.Subject.Organization, []string{"system:nodes"}):
		return "the organisation must be system:nodes and nothing else"
	case len(request.EmailAddresses) > 0 || len(request.URIs) > 0:
		return "e-mail addresses and URIs have no place in it"
	case len(request.IPAddresses) == 0 && len(request.DNSNames) == 0:
		return "it names no address"
	case !slices.Contains(csr.Spec.Usages, certificatesv1.UsageServerAuth):
		return "it is not for a server"
	}
	for _, usage := range csr.Spec.Usages {
		switch usage {
		case certificatesv1.UsageServerAuth, certificatesv1.UsageDigitalSignature, certificatesv1.UsageKeyEncipherment:
		default:
			return fmt.Sprintf("a serving certificate has no use for %q", usage)
		}
	}
	return ""
}

func checkAddresses(name string, request *x509.CertificateRequest, nodes []*corev1.Node) (verdict, string) {
	at := slices.IndexFunc(nodes, func(n *corev1.Node) bool { return n.Name == name })
	if at < 0 {
		return wait, "there is no node " + name + " yet"
	}
	ips, names := addressesOf(nodes[at])
	for _, dns := range request.DNSNames {
		if !slices.Contains(names, dns) {
			return wait, fmt.Sprintf("node %s does not have the name %q", name, dns)
		}
	}
	for _, ip := range request.IPAddresses {
		if !slices.ContainsFunc(ips, ip.Equal) {
			return wait, fmt.Sprintf("node %s does not have the address %s", name, ip)
		}
		for _, other := range nodes {
			if others, _ := addressesOf(other); other.Name != name && slices.ContainsFunc(others, ip.Equal) {
				return wait, fmt.Sprintf("node %s has the address %s too", other.Name, ip)
			}
		}
	}
	return approve, "every address is the node's own"
}

func addressesOf(node *corev1.Node) (ips []net.IP, names []string) {
	for _, address := range node.Status.Addresses {
		switch address.Type {
		case corev1.NodeInternalIP, corev1.NodeExternalIP:
			if ip := net.ParseIP(address.Address); ip != nil {
				ips = append(ips, ip)
			}
		case corev1.NodeHostName, corev1.NodeInternalDNS, corev1.NodeExternalDNS:
			names = append(names, address.Address)
		}
	}
	return ips, names
}

func approverCommand() *cobra.Command {
	var kubeconfig string
	command := &cobra.Command{
		Use:   "csr-approver",
		Short: "Approve nodes' serving certificates (started by up)",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
			if err != nil {
				return err
			}
			client, err := kubernetes.NewForConfig(config)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			return (&approver{client: client}).run(ctx)
		},
	}
	command.Flags().StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig of the user "+userApprover)
	return command
}

// approver watches requests and nodes, and judges each request until it is decided.
type approver struct {
	client   kubernetes.Interface
	nodes    corelisters.NodeLister
	requests cache.Store
	queue    workqueue.TypedRateLimitingInterface[string]
}

func (a *approver) run(ctx context.Context) error {
	onlyServing := informers.WithTweakListOptions(func(options *metav1.ListOptions) {
		options.FieldSelector = fields.OneTermEqualSelector("spec.signerName", signerServing).String()
	})
	requests := informers.NewSharedInformerFactoryWithOptions(a.client, approverResync, onlyServing)
	nodes := informers.NewSharedInformerFactory(a.client, 0)
	informer := requests.Certificates().V1().CertificateSigningRequests().Informer()
	a.requests, a.nodes = informer.GetStore(), nodes.Core().V1().Nodes().Lister()
	a.queue = workqueue.NewTypedRateLimitingQueue(
		workqueue.NewTypedItemExponentialFailureRateLimiter[string](waitFirst, waitMost))
	enqueue := func(object any) {
		if key, err := cache.MetaNamespaceKeyFunc(object); err == nil {
			a.queue.Add(key)
		}
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    enqueue,
		UpdateFunc: func(_, object any) { enqueue(object) },
	})
	if err != nil {
		return err
	}
	nodesSynced := nodes.Core().V1().Nodes().Informer().HasSynced
	requests.Start(ctx.Done())
	nodes.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced, nodesSynced) {
		return nil // told to stop
	}
	go func() {
		<-ctx.Done()
		a.queue.ShutDown()
	}()
	for a.next(ctx) {
	}
	return nil
}

// next takes one request from the queue; false when the queue has been shut down.
func (a *approver) next(ctx context.Context) bool {
	key, shutdown := a.queue.Get()
	if shutdown {
		return false
	}
	defer a.queue.Done(key)
	if err := a.sync(ctx, key); err != nil {
		slog.Warn("serving certificate not decided, trying again", "request", key, "why", err)
		a.queue.AddRateLimited(key)
		return true
	}
	a.queue.Forget(key)
	return true
}

func (a *approver) sync(ctx context.Context, key string) error {
	object, exists, err := a.requests.GetByKey(key)
	if err != nil || !exists {
		return err
	}
	csr := object.(*certificatesv1.CertificateSigningRequest).DeepCopy()
	nodes, err := a.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	verdict, reason := judge(csr, nodes)
	condition := certificatesv1.CertificateSigningRequestCondition{
		Status: corev1.ConditionTrue, Message: reason, LastUpdateTime: metav1.Now(),
	}
	switch verdict {
	case ignore:
		return nil
	case wait:
		return errors.New(reason)
	case approve:
		condition.Type, condition.Reason = certificatesv1.CertificateApproved, "NodeHasTheseAddresses"
	case deny:
		condition.Type, condition.Reason = certificatesv1.CertificateDenied, "NotANodesRequest"
	}
	csr.Status.Conditions = append(csr.Status.Conditions, condition)
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	_, err = a.client.CertificatesV1().CertificateSigningRequests().UpdateApproval(ctx, key, csr, metav1.UpdateOptions{})
	if err == nil {
		slog.Info("serving certificate "+string(condition.Type), "request", key, "node", csr.Spec.Username, "why", reason)
	}
	return err
}
