package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

func testSettings() settings {
	return settings{Address: "192.0.2.1", Port: 6443, ServiceCIDR: "10.96.0.0/16", ClusterCIDR: "10.244.0.0/16", HostCertificates: time.Hour}
}

func testLayout(t *testing.T) layout {
	t.Helper()
	l := layout{filepath.Join(t.TempDir(), "data")}
	if err := l.make(); err != nil {
		t.Fatal(err)
	}
	return l
}

func TestTokensAreWellFormedAndDiffer(t *testing.T) {
	seen := map[string]bool{}
	for range 200 {
		id, secret, err := randomToken()
		if err != nil {
			t.Fatal(err)
		}
		if token := id + "." + secret; !tokenPattern.MatchString(token) || seen[token] {
			t.Fatalf("bad token %q", token)
		}
		seen[id+"."+secret] = true
	}
}

func TestTokenID(t *testing.T) {
	for text, want := range map[string]string{"abcdef": "abcdef", "abcdef.0123456789abcdef": "abcdef", "ABCDEF": "", "abcdef.": "", "": ""} {
		if got, err := tokenID(text); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

func TestTokenRowsShowNoSecret(t *testing.T) {
	now := time.Now().UTC()
	secret := tokenSecret("abcdef", "0123456789abcdef", now.Add(time.Hour).Truncate(time.Second))
	secret.Data = map[string][]byte{}
	for key, value := range secret.StringData {
		secret.Data[key] = []byte(value)
	}
	rows := tokenRows([]corev1.Secret{*secret}, now.Truncate(time.Second))
	if len(rows) != 1 || strings.Contains(rows[0], "0123456789") || !strings.Contains(rows[0], "in 1h0m0s") {
		t.Errorf("%q", rows)
	}
	if rows := tokenRows([]corev1.Secret{*secret}, now.Add(2*time.Hour)); !strings.Contains(rows[0], "expired") {
		t.Errorf("%q", rows)
	}
}

func TestPinIsWhatKubeadmAndOpenSSLSay(t *testing.T) {
	l := testLayout(t)
	if err := ensureCA(l, "ca", time.Now()); err != nil {
		t.Fatal(err)
	}
	got, err := caPin(l)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	out, err := exec.Command("sh", "-c", "openssl x509 -in "+l.pki("ca.crt")+" -pubkey -noout | openssl pkey -pubin -outform der | openssl dgst -sha256 -r").Output()
	if err != nil {
		t.Fatal(err)
	}
	if want := "sha256:" + strings.Fields(string(out))[0]; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestCertificatesAreKeptAndRenewed(t *testing.T) {
	l, s, now := testLayout(t), testSettings(), time.Now()
	all, err := leaves(s)
	if err != nil {
		t.Fatal(err)
	}
	ensure := func(s settings, at time.Time) []string {
		t.Helper()
		made, err := ensureCertificates(l, s, at)
		if err != nil {
			t.Fatal(err)
		}
		return made
	}
	if made := ensure(s, now); len(made) != len(all) {
		t.Errorf("first start made %v", made)
	}
	pin, _ := caPin(l)
	if made := ensure(s, now.Add(time.Hour)); len(made) != 0 {
		t.Errorf("second start made %v", made)
	}
	moved := s
	moved.Address = "192.0.2.2"
	if made := ensure(moved, now); len(made) != 1 || made[0] != "apiserver" {
		t.Errorf("another address made %v", made)
	}
	if made := ensure(moved, now.Add(leafLifetime-renewBefore+time.Hour)); len(made) != len(all) {
		t.Errorf("near their end it made %v", made)
	}
	if err := os.WriteFile(l.pki("scheduler.key"), must(os.ReadFile(l.pki("admin.key"))), 0o600); err != nil {
		t.Fatal(err)
	}
	if made := ensure(moved, now.Add(leafLifetime-renewBefore+time.Hour)); len(made) != 1 || made[0] != "scheduler" {
		t.Errorf("a key of another certificate made %v", made)
	}
	if again, _ := caPin(l); again != pin {
		t.Error("the CA was made anew")
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func TestKeysAreForTheirOwnerAlone(t *testing.T) {
	l := testLayout(t)
	if _, err := ensureCertificates(l, testSettings(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := writeKubeconfigs(l, testSettings()); err != nil {
		t.Fatal(err)
	}
	err := filepath.Walk(l.root, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %o", path, info.Mode().Perm())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestSettingsNameEveryProblem(t *testing.T) {
	err := settings{Address: "lab", Port: 0, ServiceCIDR: "10.96.0.1/16", ClusterCIDR: "x"}.check()
	for _, flag := range []string{"--address", "--port", "--service-cidr", "--cluster-cidr", "--host-certificates"} {
		if err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("%s is not named in %v", flag, err)
		}
	}
	overlap := testSettings()
	overlap.ClusterCIDR = "10.96.0.0/12"
	if err := overlap.check(); err == nil || !strings.Contains(err.Error(), "overlap") {
		t.Errorf("overlap: %v", err)
	}
	if err := testSettings().check(); err != nil {
		t.Error(err)
	}
}

func TestNetworksCannotChange(t *testing.T) {
	l, s := testLayout(t), testSettings()
	if err := l.keep(s); err != nil {
		t.Fatal(err)
	}
	s.Address = "192.0.2.7"
	if err := l.keep(s); err != nil {
		t.Errorf("another address: %v", err)
	}
	s.ServiceCIDR = "10.97.0.0/16"
	if err := l.keep(s); err == nil || !strings.Contains(err.Error(), "10.96.0.0/16") {
		t.Errorf("another service network: %v", err)
	}
}

func TestOneSupervisorForOneDirectory(t *testing.T) {
	l := testLayout(t)
	unlock, err := lock(l.lock())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(l.lock()); err == nil || !strings.Contains(err.Error(), "another Supervisor") {
		t.Errorf("second lock: %v", err)
	}
	unlock()
	if unlock, err = lock(l.lock()); err != nil {
		t.Fatal(err)
	}
	unlock()
}

func TestBackoffDoublesUpToItsLimit(t *testing.T) {
	for failures, want := range map[int]time.Duration{1: time.Second, 2: 2 * time.Second, 5: 16 * time.Second, 6: 30 * time.Second, 1000: 30 * time.Second} {
		if got := backoff(failures); got != want {
			t.Errorf("after %d failures %s, want %s", failures, got, want)
		}
	}
}

func TestLogTurnsOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	log, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	chunk := make([]byte, 1<<20)
	for range 3 * logLimit >> 20 {
		if _, err := log.Write(chunk); err != nil {
			t.Fatal(err)
		}
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(path + "*")
	if len(files) != 2 {
		t.Errorf("%v", files)
	}
	for _, file := range files {
		if info := must(os.Stat(file)); info.Size() > logLimit {
			t.Errorf("%s has %d bytes", file, info.Size())
		}
	}
}

func TestMachineConfigIsTheOneThatHostsRead(t *testing.T) {
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("it's \"secret\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	registries, err := parseRegistries([]string{"10.0.0.1:5000=plain-http", "r.example=username=me,password-file=" + password})
	if err != nil {
		t.Fatal(err)
	}
	join := joining{server: "https://10.0.0.1:6443", token: "123e45.0123456789abcdef", pin: "sha256:00", expires: time.Unix(0, 0).UTC()}
	var read struct {
		APIVersion, Kind string
		Join             struct {
			Server, Token string
			CAPins        []string `json:"caPins"`
		}
		Registries map[string]struct {
			PlainHTTP                 bool `json:"plainHttp"`
			CAPem, Username, Password string
		}
	}
	if err := yaml.UnmarshalStrict([]byte(join.machineConfig(registries)), &read); err != nil {
		t.Fatal(err)
	}
	if read.APIVersion != "atoll.dev/v1" || read.Kind != "Machine" || read.Join.Token != join.token || read.Join.CAPins[0] != join.pin {
		t.Errorf("%+v", read)
	}
	if !read.Registries["10.0.0.1:5000"].PlainHTTP || read.Registries["r.example"].Password != `it's "secret"` {
		t.Errorf("%+v", read.Registries)
	}
}

func TestRegistriesNameEveryProblem(t *testing.T) {
	_, err := parseRegistries([]string{"a", "b/c=plain-http", "d=tls", "e=username=me", "f=plain-http", "f=plain-http"})
	for _, part := range []string{"--registry a", "b/c", `"tls"`, "go together", "f is there twice"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s is not in %v", part, err)
		}
	}
}

func TestComponentByNameAndByLink(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"/bin/kubectl", "get", "nodes"}, "/bin/kubectl get nodes"},
		{[]string{"atoll-supervisor", "kubectl", "get", "nodes"}, "kubectl get nodes"},
	} {
		c, ok := componentOf(test.args)
		if got := strings.Join(c.args(test.args), " "); !ok || got != test.want {
			t.Errorf("%v: %q %t", test.args, got, ok)
		}
	}
	for _, args := range [][]string{{"atoll-supervisor"}, {"atoll-supervisor", "up"}} {
		if _, ok := componentOf(args); ok {
			t.Errorf("%v is a component", args)
		}
	}
}
