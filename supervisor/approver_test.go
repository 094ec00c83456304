package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"net/url"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// servingRequest is a good request of node `n`, after `change`.
func servingRequest(t *testing.T, change func(*x509.CertificateRequest, *certificatesv1.CertificateSigningRequest)) *certificatesv1.CertificateSigningRequest {
	t.Helper()
	template := &x509.CertificateRequest{
		Subject:     pkix.Name{CommonName: "system:node:n", Organization: []string{"system:nodes"}},
		DNSNames:    []string{"n"},
		IPAddresses: []net.IP{net.ParseIP("192.0.2.1")},
	}
	csr := &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: "csr-1"},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			SignerName: signerServing,
			Username:   "system:node:n",
			Groups:     []string{"system:nodes", "system:authenticated"},
			Usages:     []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth},
		},
	}
	if change != nil {
		change(template, csr)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	if csr.Spec.Request == nil {
		csr.Spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	}
	return csr
}

func node(name, ip string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: ip}, {Type: corev1.NodeHostName, Address: name},
		}},
	}
}

func TestJudge(t *testing.T) {
	type request = x509.CertificateRequest
	type object = certificatesv1.CertificateSigningRequest
	own := []*corev1.Node{node("m", "192.0.2.2"), node("n", "192.0.2.1")}
	for name, test := range map[string]struct {
		change func(*request, *object)
		nodes  []*corev1.Node
		want   verdict
	}{
		"its own addresses":        {nil, own, approve},
		"no node yet":              {nil, own[:1], wait},
		"an address not its own":   {func(r *request, _ *object) { r.IPAddresses = append(r.IPAddresses, net.ParseIP("192.0.2.9")) }, own, wait},
		"a name not its own":       {func(r *request, _ *object) { r.DNSNames = []string{"kubernetes.default"} }, own, wait},
		"an address two have":      {nil, []*corev1.Node{node("m", "192.0.2.1"), node("n", "192.0.2.1")}, wait},
		"another signer":           {func(_ *request, o *object) { o.Spec.SignerName = "example.com/other" }, own, ignore},
		"decided already":          {decidedBefore, own, ignore},
		"signed already":           {func(_ *request, o *object) { o.Status.Certificate = []byte("x") }, own, ignore},
		"for another node":         {func(r *request, _ *object) { r.Subject.CommonName = "system:node:m" }, own, deny},
		"by a person":              {func(r *request, o *object) { o.Spec.Username, r.Subject.CommonName = "jane", "jane" }, own, deny},
		"not of the group":         {func(_ *request, o *object) { o.Spec.Groups = []string{"system:authenticated"} }, own, deny},
		"more groups":              {func(r *request, _ *object) { r.Subject.Organization = []string{"system:nodes", "system:masters"} }, own, deny},
		"also for a client":        {func(_ *request, o *object) { o.Spec.Usages = append(o.Spec.Usages, certificatesv1.UsageClientAuth) }, own, deny},
		"not for a server":         {func(_ *request, o *object) { o.Spec.Usages = o.Spec.Usages[:1] }, own, deny},
		"no address":               {func(r *request, _ *object) { r.DNSNames, r.IPAddresses = nil, nil }, own, deny},
		"an e-mail address":        {func(r *request, _ *object) { r.EmailAddresses = []string{"a@example.com"} }, own, deny},
		"a URI":                    {func(r *request, _ *object) { r.URIs = []*url.URL{{Scheme: "https", Host: "a"}} }, own, deny},
		"something else entirely":  {func(_ *request, o *object) { o.Spec.Request = []byte("hello") }, own, deny},
		"a name of nothing at all": {func(r *request, o *object) { o.Spec.Username, r.Subject.CommonName = "system:node:", "system:node:" }, own, deny},
	} {
		t.Run(name, func(t *testing.T) {
			got, reason := judge(servingRequest(t, test.change), test.nodes)
			if got != test.want {
				t.Errorf("verdict %d (%s), want %d", got, reason, test.want)
			}
			if got != ignore && reason == "" {
				t.Error("no reason given")
			}
		})
	}
}

func decidedBefore(_ *x509.CertificateRequest, o *certificatesv1.CertificateSigningRequest) {
	o.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateDenied}}
}
