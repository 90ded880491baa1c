package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"

	"github.com/idenza/fingerprint-prefetch/streams"
)

var overlays = []string{"dev", "production", "production-external"}

// object is the part of any Kubernetes object that the policy is about.
type object struct {
	Kind     string
	Data     map[string]string
	Metadata struct {
		Name, Namespace string
		Labels          map[string]string
	}
	Spec struct {
		Replicas *int
		Strategy struct {
			RollingUpdate struct{ MaxUnavailable, MaxSurge int }
		}
		Selector                   selector
		MaxUnavailable             int
		UnhealthyPodEvictionPolicy string
		Template                   struct {
			Metadata struct{ Labels map[string]string }
			Spec     podSpec
		}
		VolumeClaimTemplates []struct {
			Spec struct {
				Resources struct{ Requests map[string]string }
			}
		}
		ScaleTargetRef  struct{ Name string }
		MinReplicaCount int

		PodSelector     selector
		PolicyTypes     []string
		Ingress, Egress []rule
	}
}

type selector struct{ MatchLabels map[string]string }

func (s selector) matches(labels map[string]string) bool {
	for k, v := range s.MatchLabels {
		if labels[k] != v {
			return false
		}
	}
	return true
}

type podSpec struct {
	AutomountServiceAccountToken  *bool
	EnableServiceLinks            *bool
	HostNetwork, HostPID, HostIPC bool
	TerminationGracePeriodSeconds int
	SecurityContext               struct {
		RunAsNonRoot                   bool
		RunAsUser, RunAsGroup, FSGroup int
		SeccompProfile                 struct{ Type string }
	}
	InitContainers, Containers []container
	Volumes                    []struct {
		Name      string
		Secret    *struct{ DefaultMode int }
		ConfigMap *struct{ Name string }
		EmptyDir  *struct{ SizeLimit string }
	}
	TopologySpreadConstraints []struct{ TopologyKey string }
}

type container struct {
	Name, Image     string
	Args            []string
	Env             []envVar
	EnvFrom         []any
	Lifecycle       *struct{ PreStop any }
	SecurityContext struct {
		AllowPrivilegeEscalation *bool
		ReadOnlyRootFilesystem   bool
		Capabilities             struct{ Add, Drop []string }
	}
	Resources                                   struct{ Requests, Limits map[string]string }
	VolumeMounts                                []struct{ Name, MountPath string }
	StartupProbe, LivenessProbe, ReadinessProbe *struct{ HTTPGet struct{ Path string } }
}

type envVar struct {
	Name, Value string
	ValueFrom   *struct{ SecretKeyRef any }
}

func (c container) env(name string) string {
	for _, e := range c.Env {
		if e.Name == name {
			return e.Value
		}
	}
	return ""
}

type rule struct {
	From, To []peer
	Ports    []struct {
		Port, EndPort int
		Protocol      string
	}
}

type peer struct {
	NamespaceSelector, PodSelector *selector
	IPBlock                        *struct {
		CIDR   netip.Prefix
		Except []netip.Prefix
	}
}

// render returns the objects of an overlay, or of another directory.
func render(t *testing.T, overlay string) []object {
	t.Helper()
	rendered, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join("overlays", overlay))
	if err != nil {
		t.Fatal(err)
	}
	var objects []object
	for _, r := range rendered.Resources() {
		b, err := r.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		var o object
		if err := json.Unmarshal(b, &o); err != nil {
			t.Fatalf("%s: %v", r.CurId(), err)
		}
		objects = append(objects, o)
	}
	return objects
}

func workloads(objects []object) []object {
	return slices.DeleteFunc(slices.Clone(objects), func(o object) bool {
		return o.Kind != "Deployment" && o.Kind != "StatefulSet" && o.Kind != "Job"
	})
}

func ours(o object) bool {
	return o.Spec.Template.Metadata.Labels["app.kubernetes.io/part-of"] == "fingerprint-prefetch"
}

func forEachOverlay(t *testing.T, check func(t *testing.T, objects []object)) {
	for _, overlay := range overlays {
		t.Run(overlay, func(t *testing.T) {
			objects := render(t, overlay)
			if n := len(workloads(objects)); n < 5 {
				t.Fatalf("%d workloads", n)
			}
			check(t, objects)
		})
	}
}

func TestPodsAreRestricted(t *testing.T) {
	forEachOverlay(t, restricted)
	t.Run("console", func(t *testing.T) { restricted(t, render(t, console)) })
}

// console is rendered like an overlay.
const console = "../console"

func restricted(t *testing.T, objects []object) {
	t.Helper()
	for _, o := range objects {
		if o.Kind == "Namespace" && o.Metadata.Labels["pod-security.kubernetes.io/enforce"] != "restricted" {
			t.Error("the namespace does not enforce the restricted standard")
		}
		if o.Kind == "Secret" {
			t.Errorf("secret %s is in the manifests", o.Metadata.Name)
		}
	}
	for _, o := range workloads(objects) {
		p := o.Spec.Template.Spec
		fail := func(bad bool, what string) {
			t.Helper()
			if bad {
				t.Errorf("%s %s: %s", o.Kind, o.Metadata.Name, what)
			}
		}
		fail(o.Metadata.Namespace != "fingerprint-prefetch", "in another namespace")
		restrictPod(fail, p)
		mounted := map[string]bool{}
		for _, v := range p.Volumes {
			fail(v.Secret == nil && v.ConfigMap == nil && v.EmptyDir == nil, "mounts more than secrets, settings and scratch space")
			fail(v.Secret != nil && v.Secret.DefaultMode != 0o440, "has a secret that others may read")
		}
		for _, c := range slices.Concat(p.InitContainers, p.Containers) {
			restrictContainer(t, fail, c)
			_, tag, tagged := strings.Cut(c.Image, ":")
			fail(!tagged || tag == "latest", "image "+c.Image+" has no version")
			fail(len(c.EnvFrom) > 0, "takes its environment from elsewhere")
			for _, m := range c.VolumeMounts {
				mounted[m.MountPath] = true
			}
			for _, e := range c.Env {
				fail(e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil, e.Name+" is a secret in the environment")
				if dir, _, ok := cutLast(e.Value, "/"); ok && strings.HasSuffix(e.Name, "_FILE") {
					fail(!mounted[dir], e.Name+" names a file nobody mounts")
				}
			}
		}
	}
}

func restrictPod(fail func(bad bool, what string), p podSpec) {
	fail(p.AutomountServiceAccountToken == nil || *p.AutomountServiceAccountToken, "has a service account's token")
	fail(p.HostNetwork || p.HostPID || p.HostIPC, "shares the host's namespaces")
	fail(!p.SecurityContext.RunAsNonRoot || p.SecurityContext.RunAsUser != 65532, "does not run as 65532")
	fail(p.SecurityContext.SeccompProfile.Type != "RuntimeDefault", "has no seccomp profile")
}

func restrictContainer(t *testing.T, fail func(bad bool, what string), c container) {
	s := c.SecurityContext
	fail(s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation, "may gain privileges")
	fail(!s.ReadOnlyRootFilesystem, "can write to its root")
	fail(!slices.Equal(s.Capabilities.Drop, []string{"ALL"}) || len(s.Capabilities.Add) > 0, "has capabilities")
	limit, request := c.Resources.Limits["memory"], c.Resources.Requests["memory"]
	fail(limit == "" || limit != request, "memory is not reserved up to its limit")
	fail(c.Resources.Requests["cpu"] == "", "requests no CPU")
	fail(c.Resources.Limits["cpu"] != "", "is throttled")
	if c.Name != "redis" {
		share := bytesOf(t, c.env("GOMEMLIMIT")) / bytesOf(t, limit)
		fail(share < .85 || share > .95, fmt.Sprintf("GOMEMLIMIT is %.2f of the limit", share))
	}
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

func bytesOf(t *testing.T, s string) float64 {
	t.Helper()
	s = strings.TrimSuffix(s, "B")
	unit := map[string]float64{"Mi": 1 << 20, "Gi": 1 << 30}[s[max(len(s)-2, 0):]]
	n, err := strconv.ParseFloat(s[:max(len(s)-2, 0)], 64)
	if err != nil || unit == 0 {
		t.Fatalf("%q is no size", s)
	}
	return n * unit
}

func TestRolloutsLoseNothing(t *testing.T) {
	// What is left to close connections after both waits.
	const closing = 5 * time.Second
	forEachOverlay(t, func(t *testing.T, objects []object) {
		for _, o := range workloads(objects) {
			if !ours(o) || o.Kind == "Job" {
				continue
			}
			c := o.Spec.Template.Spec.Containers[0]
			sum := closing
			for _, name := range []string{"SHUTDOWN_GRACE", "SHUTDOWN_TIMEOUT"} {
				if v := c.env(name); v != "" {
					d, err := time.ParseDuration(v)
					if err != nil {
						t.Fatal(err)
					}
					sum += d
				} else if name == "SHUTDOWN_TIMEOUT" || o.Metadata.Name == "ingest" {
					t.Errorf("%s does not say its %s", o.Metadata.Name, name)
				}
			}
			if got := time.Duration(o.Spec.Template.Spec.TerminationGracePeriodSeconds) * time.Second; got != sum {
				t.Errorf("%s has %v to end, want %v", o.Metadata.Name, got, sum)
			}
			if c.Lifecycle != nil {
				t.Errorf("%s waits in a hook as well", o.Metadata.Name)
			}
			if c.StartupProbe == nil || c.LivenessProbe == nil || c.ReadinessProbe == nil {
				t.Fatalf("%s lacks a probe", o.Metadata.Name)
			}
			if l, r := c.LivenessProbe.HTTPGet.Path, c.ReadinessProbe.HTTPGet.Path; l != "/livez" || r != "/readyz" {
				t.Errorf("%s: liveness asks %s, readiness %s", o.Metadata.Name, l, r)
			}
			u := o.Spec.Strategy.RollingUpdate
			if o.Metadata.Name != "exporter" && (u.MaxUnavailable != 0 || u.MaxSurge != 1) {
				t.Errorf("%s is rolled out with %+v", o.Metadata.Name, u)
			}
			// Without Redis each replica calls the vendor at its share of the
			// quota: the most there can be at once must not exceed the whole.
			if n := strconv.Itoa(*cmp.Or(o.Spec.Replicas, new(int)) + u.MaxSurge); o.Metadata.Name == "prefetcher" && c.env("PREFETCH_REPLICAS") != n {
				t.Errorf("up to %s prefetchers share the quota as if they were %s", n, c.env("PREFETCH_REPLICAS"))
			}
		}
	})
}

func TestProductionSurvivesANode(t *testing.T) {
	for _, overlay := range overlays[1:] {
		objects := render(t, overlay)
		scaled := map[string]int{}
		for _, o := range objects {
			if o.Kind == "ScaledObject" {
				scaled[o.Spec.ScaleTargetRef.Name] = o.Spec.MinReplicaCount
			}
		}
		if len(scaled) != 2 || scaled["ingest"] < 2 || scaled["persister"] < 2 {
			t.Errorf("%s scales %v", overlay, scaled)
		}
		for _, o := range workloads(objects) {
			name := o.Metadata.Name
			if o.Kind == "Job" || name == "exporter" || name == "redis" {
				continue
			}
			replicas := scaled[name]
			if o.Spec.Replicas != nil {
				if replicas > 0 {
					t.Errorf("%s: an apply resets the autoscaler's %s", overlay, name)
				}
				replicas = *o.Spec.Replicas
			}
			if replicas < 2 || len(o.Spec.Template.Spec.TopologySpreadConstraints) != 2 {
				t.Errorf("%s: %s has %d replicas, not spread", overlay, name, replicas)
			}
			if !slices.ContainsFunc(objects, func(b object) bool {
				return b.Kind == "PodDisruptionBudget" && b.Spec.MaxUnavailable == 1 &&
					b.Spec.UnhealthyPodEvictionPolicy == "AlwaysAllow" && b.Spec.Selector.matches(o.Spec.Template.Metadata.Labels)
			}) {
				t.Errorf("%s: %s has no disruption budget", overlay, name)
			}
		}
	}
}

// endpoint is one side of a flow: a pod, or an address outside.
type endpoint struct {
	namespace, pod map[string]string
	ip             netip.Addr
}

func (p peer) admits(e endpoint, own bool) bool {
	if p.IPBlock != nil {
		return e.ip.IsValid() && p.IPBlock.CIDR.Contains(e.ip) &&
			!slices.ContainsFunc(p.IPBlock.Except, func(x netip.Prefix) bool { return x.Contains(e.ip) })
	}
	if e.ip.IsValid() {
		return false
	}
	if p.NamespaceSelector == nil && !own || p.NamespaceSelector != nil && !p.NamespaceSelector.matches(e.namespace) {
		return false
	}
	return p.PodSelector == nil || p.PodSelector.matches(e.pod)
}

// allowed evaluates the policies of one direction as Kubernetes does: a pod no
// policy selects is open, and of the others one rule has to admit the flow.
func allowed(objects []object, direction string, pod, other endpoint, own bool, port int) bool {
	selected := false
	for _, o := range objects {
		if o.Kind != "NetworkPolicy" || !slices.Contains(o.Spec.PolicyTypes, direction) || !o.Spec.PodSelector.matches(pod.pod) {
			continue
		}
		selected = true
		rules := o.Spec.Ingress
		if direction == "Egress" {
			rules = o.Spec.Egress
		}
		for _, r := range rules {
			ports := len(r.Ports) == 0
			for _, p := range r.Ports {
				ports = ports || p.Port == port || p.Port <= port && port <= p.EndPort
			}
			peers := slices.Concat(r.From, r.To)
			if ports && (len(peers) == 0 || slices.ContainsFunc(peers, func(p peer) bool { return p.admits(other, own) })) {
				return true
			}
		}
	}
	return !selected
}

func TestFlows(t *testing.T) {
	objects := slices.Concat(render(t, "production"), render(t, console))
	here := map[string]string{"kubernetes.io/metadata.name": "fingerprint-prefetch"}
	endpoints := map[string]endpoint{
		"gateway":    {namespace: map[string]string{"fingerprint-prefetch/gateway": "true"}},
		"scorer":     {namespace: map[string]string{"fingerprint-prefetch/scorer": "true"}},
		"prometheus": {namespace: map[string]string{"kubernetes.io/metadata.name": "monitoring"}},
		"stranger":   {namespace: map[string]string{"kubernetes.io/metadata.name": "default"}},
		"dns":        {namespace: map[string]string{"kubernetes.io/metadata.name": "kube-system"}, pod: map[string]string{"k8s-app": "kube-dns"}},
	}
	for _, ip := range []string{"203.0.113.9", "10.1.2.3", "172.20.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "2606:4700::1", "fd00:ec2::254", "::ffff:10.1.2.3"} {
		endpoints[ip] = endpoint{ip: netip.MustParseAddr(ip)}
	}
	inside := map[string]bool{}
	for _, o := range workloads(objects) {
		name, _, _ := strings.Cut(o.Metadata.Name, "-")
		endpoints[name], inside[name] = endpoint{namespace: here, pod: o.Spec.Template.Metadata.Labels}, true
	}
	want := map[string]bool{}
	for _, f := range []string{
		"gateway ingest 8080", "scorer redis 6379", "persister redis 6379", "prefetcher redis 6379", "nats nats 6222",
		"ingest nats 4222", "prefetcher nats 4222", "persister nats 4222", "exporter nats 4222", "streams nats 4222", "console nats 4222", "console redis 6379",
		"prometheus ingest 9101", "prometheus prefetcher 9102", "prometheus persister 9103", "prometheus exporter 9104",
		"prefetcher 203.0.113.9 443", "prefetcher 2606:4700::1 443",
		"ingest dns 53", "prefetcher dns 53", "persister dns 53", "exporter dns 53", "streams dns 53", "console dns 53", "nats dns 53", "redis dns 53",
	} {
		want[f] = true
	}
	// Operators' ports are told apart by the pods that listen on them.
	listens := map[int]string{9101: "ingest", 9102: "prefetcher", 9103: "persister", 9104: "exporter"}
	n := 0
	for from, f := range endpoints {
		for to, d := range endpoints {
			if !inside[from] && !inside[to] {
				continue
			}
			for _, port := range []int{22, 53, 80, 443, 4222, 6222, 6379, 8080, 8222, 9101, 9102, 9103, 9104} {
				if who, ok := listens[port]; ok && who != to {
					continue
				}
				own := inside[from] && inside[to]
				got := (!inside[from] || allowed(objects, "Egress", f, d, own, port)) &&
					(!inside[to] || allowed(objects, "Ingress", d, f, own, port))
				flow := fmt.Sprint(from, " ", to, " ", port)
				if got != want[flow] {
					t.Errorf("%s: allowed %v", flow, got)
				}
				n++
			}
		}
	}
	t.Logf("%d flows, %d of them allowed", n, len(want))
}

// TestAddressBlocksAreValid holds the policies to what the API server demands
// beyond the schema: validation.ValidateIPBlock of Kubernetes, which compares
// with net.IPNet. To that, ::ffff:0:0/96 is IPv4 and in no block of IPv6.
func TestAddressBlocksAreValid(t *testing.T) {
	n := 0
	check := func(t *testing.T, objects []object) {
		for _, o := range objects {
			for _, r := range slices.Concat(o.Spec.Ingress, o.Spec.Egress) {
				for _, p := range slices.Concat(r.From, r.To) {
					if p.IPBlock == nil {
						continue
					}
					_, block, err := net.ParseCIDR(p.IPBlock.CIDR.String())
					if err != nil {
						t.Fatal(err)
					}
					for _, e := range p.IPBlock.Except {
						n++
						ip, except, err := net.ParseCIDR(e.String())
						if err != nil || !except.IP.Equal(ip) {
							t.Fatalf("%s is no block: %v", e, err)
						}
						outer, _ := block.Mask.Size()
						if inner, _ := except.Mask.Size(); !block.Contains(except.IP) || inner <= outer || e.Addr().Is4In6() {
							t.Errorf("%s: the API server refuses %s within %s", o.Metadata.Name, e, p.IPBlock.CIDR)
						}
					}
				}
			}
		}
	}
	forEachOverlay(t, check)
	if n < 10 {
		t.Errorf("only %d exceptions seen", n)
	}
}

// TestSizesFitTheLoad holds every limit against the formulas of the README, for
// its first column.
func TestSizesFitTheLoad(t *testing.T) {
	const (
		rate              = 5.0 // events a second
		ingest, enriched  = 400, 8 << 10
		streamAge, record = 72 * 3600, 24 * 3600 // seconds
		purgedFrom        = 0.8                  // of a stream's limit; the janitor's Pressure
	)
	setting := func(conf, name string) string {
		for line := range strings.Lines(conf) {
			if f := strings.Fields(line); len(f) == 2 && strings.TrimSuffix(f[0], ":") == name {
				return f[1]
			}
		}
		t.Fatalf("no %s", name)
		return ""
	}
	limits := streams.Limits{MaxBytes: map[string]int64{}}
	var natsVolume, redisVolume, redisMemory, fileStore, maxMemory float64
	for _, o := range render(t, "production") {
		pod := o.Spec.Template.Spec
		switch name, _, _ := strings.Cut(o.Metadata.Name, "-"); {
		case o.Kind == "Job" && name == "streams":
			for _, arg := range pod.Containers[0].Args {
				if v, ok := strings.CutPrefix(arg, "--max-bytes="); ok {
					stream, size, _ := strings.Cut(v, "=")
					limits.MaxBytes[stream] = int64(bytesOf(t, size))
				}
			}
		case o.Kind == "StatefulSet" && name == "nats":
			natsVolume = bytesOf(t, o.Spec.VolumeClaimTemplates[0].Spec.Resources.Requests["storage"])
		case o.Kind == "StatefulSet" && name == "redis":
			redisVolume = bytesOf(t, o.Spec.VolumeClaimTemplates[0].Spec.Resources.Requests["storage"])
			redisMemory = bytesOf(t, pod.Containers[0].Resources.Limits["memory"])
		case o.Kind == "ConfigMap" && name == "nats": // both servers mean 1024 by GB
			fileStore = bytesOf(t, strings.Replace(setting(o.Data["nats.conf"], "max_file_store"), "GB", "GiB", 1))
		case o.Kind == "ConfigMap" && name == "redis":
			maxMemory = bytesOf(t, strings.Replace(setting(o.Data["redis.conf"], "maxmemory"), "gb", "GiB", 1))
		}
	}
	var all float64
	for _, d := range streams.Definition(limits) {
		limit := float64(d.Stream.MaxBytes)
		all += limit
		need := map[string]float64{streams.StreamIngest: rate * ingest * streamAge, streams.StreamEnriched: rate * enriched * streamAge}[d.Stream.Name]
		if purgedFrom*limit < need {
			t.Errorf("%s holds %.1f GB before it is purged, needs %.1f", d.Stream.Name, purgedFrom*limit/1e9, need/1e9)
		}
	}
	for name, tt := range map[string]struct{ have, need float64 }{
		"max_file_store":                    {fileStore, all},
		"the volume of NATS":                {natsVolume, 1.2 * fileStore},
		"maxmemory":                         {maxMemory, rate * (enriched + 200) * record},
		"the memory of Redis":               {redisMemory, 1.5 * maxMemory},
		"the volume of Redis, rewrites too": {redisVolume, 4 * maxMemory},
	} {
		if tt.have < tt.need || tt.need == 0 {
			t.Errorf("%s is %.1f GB, needs %.1f", name, tt.have/1e9, tt.need/1e9)
		}
	}
}

func TestNATSUsersAreGenerated(t *testing.T) {
	var want bytes.Buffer
	if err := run([]string{"users"}, nil, &want); err != nil {
		t.Fatal(err)
	}
	have, err := os.ReadFile("components/nats/users.conf")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, want.Bytes()) {
		t.Error("users.conf is not what the streams' definition gives: go run ./deployments/k8s users > deployments/k8s/components/nats/users.conf")
	}
}
