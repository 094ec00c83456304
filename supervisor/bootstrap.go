package main

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

const (
	groupBootstrappers = "system:bootstrappers:kubeadm:default-node-token"
	objectsWithin      = time.Minute
	signerServing      = "kubernetes.io/kubelet-serving"
)

// ensureObjects makes the objects that joining needs, at every start: a restored or upgraded cluster gets what is
// missing. The names are kubeadm's where kubeadm has one, so that its tools find them.
func ensureObjects(ctx context.Context, l layout, s settings) error {
	client, err := clientFor(l, s, "bootstrap")
	if err != nil {
		return err
	}
	info, err := clusterInfo(l, s)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, objectsWithin)
	defer cancel()
	for {
		if err = applyObjects(ctx, client, info); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot make the objects that let hosts join: %w", err)
		case <-time.After(200 * time.Millisecond): // kube-public itself is made a moment after /readyz
		}
	}
}

// clusterInfo is what a host reads before it trusts anyone: the server's address and the CA. The controller-manager
// signs it with every token.
func clusterInfo(l layout, s settings) (*corev1.ConfigMap, error) {
	config, err := kubeconfigFor(l, s, "admin", true)
	if err != nil {
		return nil, err
	}
	public := api.NewConfig()
	public.Clusters[""] = config.Clusters[clusterName]
	text, err := clientcmd.Write(*public)
	if err != nil {
		return nil, err
	}
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "cluster-info", Namespace: metav1.NamespacePublic},
		Data:       map[string]string{"kubeconfig": string(text)},
	}, nil
}

func applyObjects(ctx context.Context, client kubernetes.Interface, info *corev1.ConfigMap) error {
	if err := applyClusterInfo(ctx, client, info); err != nil {
		return err
	}
	for _, role := range clusterRoles() {
		if err := applyClusterRole(ctx, client, role); err != nil {
			return err
		}
	}
	for _, binding := range clusterRoleBindings() {
		_, err := client.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
	}
	role, binding := clusterInfoReaders()
	_, err := client.RbacV1().Roles(role.Namespace).Create(ctx, role, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	_, err = client.RbacV1().RoleBindings(binding.Namespace).Create(ctx, binding, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	return nil
}

// applyClusterInfo creates the ConfigMap or replaces its kubeconfig, leaving the signatures to their controller.
func applyClusterInfo(ctx context.Context, client kubernetes.Interface, info *corev1.ConfigMap) error {
	maps := client.CoreV1().ConfigMaps(info.Namespace)
	_, err := maps.Create(ctx, info, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	have, err := maps.Get(ctx, info.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if have.Data["kubeconfig"] == info.Data["kubeconfig"] {
		return nil
	}
	have.Data["kubeconfig"] = info.Data["kubeconfig"]
	_, err = maps.Update(ctx, have, metav1.UpdateOptions{})
	return err
}

func applyClusterRole(ctx context.Context, client kubernetes.Interface, role *rbacv1.ClusterRole) error {
	roles := client.RbacV1().ClusterRoles()
	_, err := roles.Create(ctx, role, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	have, err := roles.Get(ctx, role.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	have.Rules = role.Rules
	_, err = roles.Update(ctx, have, metav1.UpdateOptions{})
	return err
}

func clusterRoles() []*rbacv1.ClusterRole {
	return []*rbacv1.ClusterRole{{
		ObjectMeta: metav1.ObjectMeta{Name: userApprover},
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"certificatesigningrequests"}, Verbs: []string{"get", "list", "watch"}},
			{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"certificatesigningrequests/approval"}, Verbs: []string{"update"}},
			{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"signers"}, ResourceNames: []string{signerServing}, Verbs: []string{"approve"}},
			{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get", "list", "watch"}},
		},
	}}
}

func clusterRoleBindings() []*rbacv1.ClusterRoleBinding {
	bind := func(name, role, kind, subject string) *rbacv1.ClusterRoleBinding {
		return &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
			Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: kind, Name: subject}},
		}
	}
	const csr = "system:certificates.k8s.io:certificatesigningrequests:"
	return []*rbacv1.ClusterRoleBinding{
		bind(groupAdmins, "cluster-admin", rbacv1.GroupKind, groupAdmins),
		bind(userApprover, userApprover, rbacv1.UserKind, userApprover),
		bind("atoll:kubelet-api-admin", "system:kubelet-api-admin", rbacv1.UserKind, userAPIServer),
		bind("kubeadm:kubelet-bootstrap", "system:node-bootstrapper", rbacv1.GroupKind, groupBootstrappers),
		bind("kubeadm:node-autoapprove-bootstrap", csr+"nodeclient", rbacv1.GroupKind, groupBootstrappers),
		bind("kubeadm:node-autoapprove-certificate-rotation", csr+"selfnodeclient", rbacv1.GroupKind, "system:nodes"),
	}
}

// clusterInfoReaders let anyone read cluster-info, and nothing else.
func clusterInfoReaders() (*rbacv1.Role, *rbacv1.RoleBinding) {
	meta := metav1.ObjectMeta{Name: "kubeadm:bootstrap-signer-clusterinfo", Namespace: metav1.NamespacePublic}
	role := &rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{{
		APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{"cluster-info"}, Verbs: []string{"get"},
	}}}
	binding := &rbacv1.RoleBinding{
		ObjectMeta: meta,
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: meta.Name},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: "system:anonymous"}},
	}
	return role, binding
}
