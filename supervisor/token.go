package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"sort"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"
)

const tokenAlphabet = "abcdefghijklmnopqrstuvwxyz0123456789"

var (
	tokenPattern   = regexp.MustCompile(`^[a-z0-9]{6}\.[a-z0-9]{16}$`)
	tokenIDPattern = regexp.MustCompile(`^[a-z0-9]{6}$`)
)

// randomToken is `id.secret`, from the kernel's random numbers.
func randomToken() (id, secret string, err error) {
	text, err := randomText(22)
	if err != nil {
		return "", "", err
	}
	return text[:6], text[6:], nil
}

// randomText draws evenly from the alphabet: bytes that would favour its beginning are thrown away.
func randomText(length int) (string, error) {
	const fair = 256 - 256%len(tokenAlphabet)
	var text strings.Builder
	buffer := make([]byte, 32)
	for text.Len() < length {
		if _, err := rand.Read(buffer); err != nil {
			return "", fmt.Errorf("no random numbers: %w", err)
		}
		for _, b := range buffer {
			if int(b) < fair && text.Len() < length {
				text.WriteByte(tokenAlphabet[int(b)%len(tokenAlphabet)])
			}
		}
	}
	return text.String(), nil
}

func tokenCommand() *cobra.Command {
	command := &cobra.Command{Use: "token", Short: "Tokens with which hosts join"}
	command.AddCommand(tokenCreateCommand(), tokenListCommand(), tokenDeleteCommand())
	return command
}

func tokenCreateCommand() *cobra.Command {
	var data string
	var ttl time.Duration
	var machineConfig bool
	var registries []string
	command := &cobra.Command{
		Use:   "create",
		Short: "Make a token and print how to join with it",
		Long: `Make a token and print how to join with it: server, token and pin of the cluster's CA in one line, or a whole
machine config.

    atoll-supervisor token create
    atoll-supervisor token create --ttl 1h --machine-config > machine.yaml
    atoll-supervisor token create --machine-config --registry 10.0.0.1:5000=plain-http > machine.yaml

A token only lets a host ask for its own node identity, and only until it expires. Hosts that have joined do not need
it any more.`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			if ttl < 0 {
				return fmt.Errorf("--ttl %s is negative: give a duration such as 24h, or 0 for a token without end", ttl)
			}
			settings, err := parseRegistries(registries)
			if err != nil {
				return err
			}
			if len(settings) > 0 && !machineConfig {
				return errors.New("--registry is part of a machine config: add --machine-config")
			}
			join, err := createToken(command.Context(), layout{data}, ttl)
			if err != nil {
				return err
			}
			text := join.line()
			if machineConfig {
				text = join.machineConfig(settings)
			}
			_, err = fmt.Fprint(command.OutOrStdout(), text)
			return err
		},
	}
	dataFlag(command, &data)
	command.Flags().DurationVar(&ttl, "ttl", 24*time.Hour, "how long the token is good for; 0 for ever")
	command.Flags().BoolVar(&machineConfig, "machine-config", false, "print a whole machine config")
	command.Flags().StringArrayVar(&registries, "registry", nil,
		"with --machine-config: an image registry and how to speak to it, HOST[:PORT]=SETTING[,SETTING…] with the settings plain-http, ca=FILE, username=NAME, password-file=FILE; may be repeated")
	return command
}

// joining is what a host needs to know.
type joining struct {
	server, token, pin string
	expires            time.Time
}

func (j joining) line() string {
	return fmt.Sprintf("server=%s token=%s ca-pin=%s\n", j.server, j.token, j.pin)
}

// startedClient is a client for the commands that need a running Supervisor.
func startedClient(l layout) (settings, kubernetes.Interface, error) {
	s, err := l.loadStarted()
	if err != nil {
		return s, nil, err
	}
	client, err := clientFor(l, s, "admin")
	return s, client, err
}

// explain adds what to do to an error of a request.
func explain(l layout, what string, err error) error {
	var connection *url.Error
	if errors.As(err, &connection) {
		return fmt.Errorf("%s: the Supervisor does not answer (%w): is `atoll-supervisor up --data %s` running?", what, connection.Err, l.root)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func createToken(ctx context.Context, l layout, ttl time.Duration) (joining, error) {
	s, client, err := startedClient(l)
	if err != nil {
		return joining{}, err
	}
	pin, err := caPin(l)
	if err != nil {
		return joining{}, err
	}
	id, secret, err := randomToken()
	if err != nil {
		return joining{}, err
	}
	join := joining{server: s.server(), token: id + "." + secret, pin: pin}
	if ttl > 0 {
		join.expires = time.Now().Add(ttl).UTC().Truncate(time.Second)
	}
	_, err = client.CoreV1().Secrets(metav1.NamespaceSystem).Create(ctx, tokenSecret(id, secret, join.expires), metav1.CreateOptions{})
	if err != nil {
		return joining{}, explain(l, "cannot make a token", err)
	}
	return join, nil
}

func tokenSecret(id, secret string, expires time.Time) *corev1.Secret {
	data := map[string]string{
		bootstrapapi.BootstrapTokenIDKey:               id,
		bootstrapapi.BootstrapTokenSecretKey:           secret,
		bootstrapapi.BootstrapTokenUsageAuthentication: "true",
		bootstrapapi.BootstrapTokenUsageSigningKey:     "true",
		bootstrapapi.BootstrapTokenExtraGroupsKey:      groupBootstrappers,
		bootstrapapi.BootstrapTokenDescriptionKey:      "made by atoll-supervisor token create",
	}
	if !expires.IsZero() {
		data[bootstrapapi.BootstrapTokenExpirationKey] = expires.Format(time.RFC3339)
	}
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: bootstrapapi.BootstrapTokenSecretPrefix + id, Namespace: metav1.NamespaceSystem},
		Type:       bootstrapapi.SecretTypeBootstrapToken,
		StringData: data,
	}
}

func tokenListCommand() *cobra.Command {
	var data string
	command := &cobra.Command{
		Use:   "list",
		Short: "List tokens, without their secrets",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			l := layout{data}
			_, client, err := startedClient(l)
			if err != nil {
				return err
			}
			secrets, err := client.CoreV1().Secrets(metav1.NamespaceSystem).List(command.Context(), metav1.ListOptions{
				FieldSelector: "type=" + string(bootstrapapi.SecretTypeBootstrapToken),
			})
			if err != nil {
				return explain(l, "cannot list tokens", err)
			}
			table := tabwriter.NewWriter(command.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintln(table, "ID\tEXPIRES\tDESCRIPTION")
			for _, row := range tokenRows(secrets.Items, time.Now()) {
				fmt.Fprintln(table, row)
			}
			return table.Flush()
		},
	}
	dataFlag(command, &data)
	return command
}

func tokenRows(secrets []corev1.Secret, now time.Time) []string {
	rows := make([]string, 0, len(secrets))
	for _, secret := range secrets {
		left := "never"
		if text, ok := secret.Data[bootstrapapi.BootstrapTokenExpirationKey]; ok {
			left = "at " + string(text)
			if end, err := time.Parse(time.RFC3339, string(text)); err == nil {
				left = "in " + end.Sub(now).Round(time.Second).String()
				if !end.After(now) {
					left = "expired"
				}
			}
		}
		rows = append(rows, fmt.Sprintf("%s\t%s\t%s", secret.Data[bootstrapapi.BootstrapTokenIDKey], left,
			secret.Data[bootstrapapi.BootstrapTokenDescriptionKey]))
	}
	sort.Strings(rows)
	return rows
}

func tokenDeleteCommand() *cobra.Command {
	var data string
	command := &cobra.Command{
		Use:   "delete ID|TOKEN…",
		Short: "Delete tokens; hosts that have joined stay",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			l := layout{data}
			_, client, err := startedClient(l)
			if err != nil {
				return err
			}
			for _, arg := range args {
				id, err := tokenID(arg)
				if err != nil {
					return err
				}
				err = client.CoreV1().Secrets(metav1.NamespaceSystem).Delete(command.Context(),
					bootstrapapi.BootstrapTokenSecretPrefix+id, metav1.DeleteOptions{})
				if apierrors.IsNotFound(err) {
					return fmt.Errorf("there is no token %s: `atoll-supervisor token list` shows those there are", id)
				}
				if err != nil {
					return explain(l, "cannot delete token "+id, err)
				}
				fmt.Fprintln(os.Stderr, "deleted token", id)
			}
			return nil
		},
	}
	dataFlag(command, &data)
	return command
}

func tokenID(text string) (string, error) {
	if tokenPattern.MatchString(text) {
		return text[:6], nil
	}
	if tokenIDPattern.MatchString(text) {
		return text, nil
	}
	return "", errors.New("a token is six letters or digits, a dot and sixteen more; an id is the first six")
}
