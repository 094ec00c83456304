package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

const clusterName = "atoll"

// kubeconfigFor builds a kubeconfig for one user; with embed the certificates are inside, otherwise they are named, so
// that a renewed certificate is used without a restart.
func kubeconfigFor(l layout, s settings, user string, embed bool) (*api.Config, error) {
	config := api.NewConfig()
	cluster := &api.Cluster{Server: s.server(), CertificateAuthority: l.pki("ca.crt")}
	info := &api.AuthInfo{ClientCertificate: l.pki(user + ".crt"), ClientKey: l.pki(user + ".key")}
	config.Clusters[clusterName] = cluster
	config.AuthInfos[user] = info
	config.Contexts[clusterName] = &api.Context{Cluster: clusterName, AuthInfo: user}
	config.CurrentContext = clusterName
	if !embed {
		return config, nil
	}
	for _, file := range []struct {
		path *string
		data *[]byte
	}{
		{&cluster.CertificateAuthority, &cluster.CertificateAuthorityData},
		{&info.ClientCertificate, &info.ClientCertificateData},
		{&info.ClientKey, &info.ClientKeyData},
	} {
		text, err := os.ReadFile(*file.path)
		if err != nil {
			return nil, fmt.Errorf("cannot make the kubeconfig of %s: %w", user, err)
		}
		*file.path, *file.data = "", text
	}
	return config, nil
}

// writeKubeconfigs makes those of the components and the administrator's.
func writeKubeconfigs(l layout, s settings) error {
	for _, user := range []string{"controller-manager", "scheduler", "csr-approver"} {
		config, err := kubeconfigFor(l, s, user, false)
		if err != nil {
			return err
		}
		if err := writeKubeconfig(l.kubeconfig(user), config); err != nil {
			return err
		}
	}
	return writeAdminKubeconfig(l, s)
}

func writeAdminKubeconfig(l layout, s settings) error {
	admin, err := kubeconfigFor(l, s, "admin", true)
	if err != nil {
		return err
	}
	return writeKubeconfig(l.adminKubeconfig(), admin)
}

func writeKubeconfig(path string, config *api.Config) error {
	text, err := clientcmd.Write(*config)
	if err != nil {
		return err
	}
	return writeFile(path, text, 0o600)
}

// clientFor is a client with the rights of one of the Supervisor's own users.
func clientFor(l layout, s settings, user string) (kubernetes.Interface, error) {
	return kubernetes.NewForConfig(&rest.Config{
		Host: s.server(),
		TLSClientConfig: rest.TLSClientConfig{
			CAFile:   l.pki("ca.crt"),
			CertFile: l.pki(user + ".crt"),
			KeyFile:  l.pki(user + ".key"),
		},
		Timeout: requestTimeout,
	})
}

func kubeconfigCommand() *cobra.Command {
	var data string
	command := &cobra.Command{
		Use:   "kubeconfig",
		Short: "Print a kubeconfig with an administrator's rights",
		Long: `Print a kubeconfig with an administrator's rights. Whoever has it owns the cluster: keep it like a password.

    atoll-supervisor kubeconfig > ~/.kube/config`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			l := layout{data}
			s, err := l.loadStarted()
			if err != nil {
				return err
			}
			config, err := kubeconfigFor(l, s, "admin", true)
			if err != nil {
				return err
			}
			text, err := clientcmd.Write(*config)
			if err != nil {
				return err
			}
			_, err = command.OutOrStdout().Write(text)
			return err
		},
	}
	dataFlag(command, &data)
	return command
}
