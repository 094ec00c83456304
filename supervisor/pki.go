package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"slices"
	"sort"
	"time"
)

const (
	caLifetime   = 10 * 365 * 24 * time.Hour
	leafLifetime = 365 * 24 * time.Hour
	// renewBefore is how long before its end a certificate is made anew.
	renewBefore = 60 * 24 * time.Hour
	// renewEvery is how often `up` looks; every reader loads its files again by itself.
	renewEvery = 12 * time.Hour
)

// leaf describes a certificate that the Supervisor makes for itself.
type leaf struct {
	name         string
	ca           string
	commonName   string
	organisation []string
	server       bool
	ips          []net.IP
	dns          []string
}

const (
	userAPIServer  = "kube-apiserver-kubelet-client"
	userApprover   = "atoll:csr-approver"
	groupAdmins    = "atoll:cluster-admins"
	userAggregator = "front-proxy-client"
)

// leaves lists every certificate below the two CAs.
func leaves(s settings) ([]leaf, error) {
	service, err := firstServiceIP(s.ServiceCIDR)
	if err != nil {
		return nil, err
	}
	ips := []net.IP{net.ParseIP(s.Address), net.IPv4(127, 0, 0, 1), service}
	dns := []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
	if host, err := os.Hostname(); err == nil && host != "" {
		dns = append(dns, host)
	}
	for _, san := range s.SANs {
		if ip := net.ParseIP(san); ip != nil {
			ips = append(ips, ip)
		} else {
			dns = append(dns, san)
		}
	}
	return []leaf{
		{name: "apiserver", ca: "ca", commonName: "kube-apiserver", server: true, ips: ips, dns: dns},
		{name: "apiserver-kubelet-client", ca: "ca", commonName: userAPIServer},
		{name: "front-proxy-client", ca: "front-proxy-ca", commonName: userAggregator},
		{name: "controller-manager", ca: "ca", commonName: "system:kube-controller-manager"},
		{name: "scheduler", ca: "ca", commonName: "system:kube-scheduler"},
		{name: "csr-approver", ca: "ca", commonName: userApprover},
		// Used by `up` alone, to make the objects that give everyone else their rights.
		{name: "bootstrap", ca: "ca", commonName: "atoll:bootstrap", organisation: []string{"system:masters"}},
		{name: "admin", ca: "ca", commonName: "atoll:admin", organisation: []string{groupAdmins}},
	}, nil
}

// firstServiceIP is the address of the service `kubernetes`.
func firstServiceIP(cidr string) (net.IP, error) {
	_, parsed, err := net.ParseCIDR(cidr)
	if err != nil {
		return nil, fmt.Errorf("--service-cidr %q is not a network", cidr)
	}
	ip := slices.Clone(parsed.IP)
	ip[len(ip)-1]++
	return ip, nil
}

// ensureCertificates makes what is missing, about to end, or made for other names. CAs and the service-account key
// are only ever made once. It reports the leaves it made.
func ensureCertificates(l layout, s settings, now time.Time) ([]string, error) {
	for _, ca := range []string{"ca", "front-proxy-ca"} {
		if err := ensureCA(l, ca, now); err != nil {
			return nil, err
		}
	}
	if err := ensureServiceAccountKey(l); err != nil {
		return nil, err
	}
	wanted, err := leaves(s)
	if err != nil {
		return nil, err
	}
	var made []string
	for _, leaf := range wanted {
		if current(l, leaf, now) {
			continue
		}
		if err := issue(l, leaf, now); err != nil {
			return made, err
		}
		made = append(made, leaf.name)
	}
	return made, nil
}

func ensureCA(l layout, name string, now time.Time) error {
	if _, err := os.Stat(l.pki(name + ".crt")); err == nil {
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := serialNumber()
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "atoll-" + name},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(caLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("cannot make the certificate authority %s: %w", name, err)
	}
	return writePair(l, name, der, key)
}

func ensureServiceAccountKey(l layout) error {
	if _, err := os.Stat(l.pki("sa.pub")); err == nil {
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if err := writeKey(l.pki("sa.key"), key); err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return writeFile(l.pki("sa.pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600)
}

// current tells whether a leaf on disk is good for a while yet and made for the same names.
func current(l layout, want leaf, now time.Time) bool {
	have, err := readCertificate(l.pki(want.name + ".crt"))
	if err != nil {
		return false
	}
	ca, err := readCertificate(l.pki(want.ca + ".crt"))
	if err != nil || have.CheckSignatureFrom(ca) != nil || now.Add(renewBefore).After(have.NotAfter) || now.Before(have.NotBefore) {
		return false
	}
	key, err := readKey(l.pki(want.name + ".key"))
	if err != nil || !have.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(key.Public()) {
		return false // an earlier start ended between key and certificate
	}
	return have.Subject.CommonName == want.commonName && slices.Equal(have.Subject.Organization, want.organisation) &&
		slices.Equal(names(have.IPAddresses, have.DNSNames), names(want.ips, want.dns))
}

func names(ips []net.IP, dns []string) []string {
	all := slices.Clone(dns)
	for _, ip := range ips {
		all = append(all, ip.String())
	}
	sort.Strings(all)
	return slices.Compact(all)
}

func issue(l layout, want leaf, now time.Time) error {
	ca, err := readCertificate(l.pki(want.ca + ".crt"))
	if err != nil {
		return err
	}
	caKey, err := readKey(l.pki(want.ca + ".key"))
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := serialNumber()
	if err != nil {
		return err
	}
	usage := x509.ExtKeyUsageClientAuth
	if want.server {
		usage = x509.ExtKeyUsageServerAuth
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: want.commonName, Organization: want.organisation},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(leafLifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{usage},
		IPAddresses:  want.ips,
		DNSNames:     want.dns,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey)
	if err != nil {
		return fmt.Errorf("cannot make the certificate %s: %w", want.name, err)
	}
	return writePair(l, want.name, der, key)
}

// writePair writes the key first: a certificate on disk always has its key beside it.
func writePair(l layout, name string, der []byte, key *ecdsa.PrivateKey) error {
	if err := writeKey(l.pki(name+".key"), key); err != nil {
		return err
	}
	return writeFile(l.pki(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return writeFile(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

func serialNumber() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

func readPEM(path string) ([]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s is not PEM: restore it from a backup", path)
	}
	return block.Bytes, nil
}

func readCertificate(path string) (*x509.Certificate, error) {
	der, err := readPEM(path)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func readKey(path string) (crypto.Signer, error) {
	der, err := readPEM(path)
	if err != nil {
		return nil, err
	}
	return x509.ParseECPrivateKey(der)
}

// pin is what a joining host must find in the cluster's CA: the SHA-256 of its public key, as kubeadm writes it.
func pin(certificate *x509.Certificate) string {
	sum := sha256.Sum256(certificate.RawSubjectPublicKeyInfo)
	return "sha256:" + hex.EncodeToString(sum[:])
}

var errNoPin = errors.New("the cluster's CA cannot be read")

func caPin(l layout) (string, error) {
	ca, err := readCertificate(l.pki("ca.crt"))
	if err != nil {
		return "", fmt.Errorf("%w: %w", errNoPin, err)
	}
	return pin(ca), nil
}
