package main

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	_ "time/tzdata" // time zones of CronJobs, also on machines without a zone database

	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	"k8s.io/component-base/version"

	"github.com/spf13/cobra"
	_ "k8s.io/client-go/plugin/pkg/client/auth"
	"k8s.io/component-base/logs"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

// component is one of the programs inside this file that see the rest of the command line as their own.
type component struct {
	short string
	run   func() int
}

var components = map[string]component{
	"etcd":                    {"etcd, one member, on a unix socket (started by up)", runEtcd},
	"kube-apiserver":          {"Kubernetes' API server (started by up)", func() int { return cli.Run(apiserver.NewAPIServerCommand()) }},
	"kube-controller-manager": {"Kubernetes' controllers (started by up)", func() int { return cli.Run(controllermanager.NewControllerManagerCommand()) }},
	"kube-scheduler":          {"Kubernetes' scheduler (started by up)", func() int { return cli.Run(scheduler.NewSchedulerCommand()) }},
	"kubectl":                 {"Kubernetes' command-line client", runKubectl},
}

func componentNames() []string {
	names := make([]string, 0, len(components))
	for name := range components {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// runKubectl is upstream's main, with this Supervisor's kubeconfig where the user has none.
func runKubectl() int {
	if os.Getenv("KUBECONFIG") == "" {
		home, _ := os.UserHomeDir() // without a home there is no ~/.kube/config either
		_, err := os.Stat(filepath.Join(home, ".kube", "config"))
		ours := layout{defaultData()}.adminKubeconfig()
		if _, missing := os.Stat(ours); err != nil && missing == nil {
			_ = os.Setenv("KUBECONFIG", ours) // fails for malformed names only, and this one is not
		}
	}
	_, _ = logs.GlogSetter(kubectl.GetLogVerbosity(os.Args)) // as upstream's main: a bad verbosity is reported later
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		kubectlutil.CheckErr(err)
		return 1
	}
	return 0
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Version of Kubernetes inside",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(command.OutOrStdout(), "Kubernetes", version.Get().GitVersion)
			return err
		},
	}
}
