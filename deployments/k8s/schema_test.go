//go:build checkops

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// crds are the modules whose custom resources the manifests use.
var crds = map[string]string{
	"github.com/kedacore/keda/v2@v2.21.0":                        "config/crd/bases",
	"github.com/prometheus-operator/prometheus-operator@v0.85.0": "example/prometheus-operator-crd",
}

// TestManifestsMatchTheirSchemas validates each overlay strictly, without a
// cluster: against the schemas in kubectl-validate (KUBECTL_VALIDATE names the
// executable) and the CRDs. It then plants unknown fields and wrong types,
// which must be refused.
func TestManifestsMatchTheirSchemas(t *testing.T) {
	dir := t.TempDir()
	for module, path := range crds {
		out, err := exec.Command("go", "mod", "download", "-json", module).Output()
		if err != nil {
			t.Fatalf("download %s: %v", module, err)
		}
		var m struct{ Dir string }
		if err := json.Unmarshal(out, &m); err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(m.Dir, path, "*.yaml"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s has no CRDs: %v", module, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			// kubectl-validate knows the kinds by these files alone.
			if strings.Contains(string(b), "kind: CustomResourceDefinition") {
				if err := os.WriteFile(filepath.Join(dir, filepath.Base(f)), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	validate := func(t *testing.T, manifests string) (string, error) {
		t.Helper()
		file := filepath.Join(t.TempDir(), "all.yaml")
		if err := os.WriteFile(file, []byte(manifests), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(os.Getenv("KUBECTL_VALIDATE"), "--local-crds", dir, file).CombinedOutput()
		return string(out), err
	}
	for _, overlay := range append(slices.Clone(overlays), console) {
		t.Run(overlay, func(t *testing.T) {
			rendered, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join("overlays", overlay))
			if err != nil {
				t.Fatal(err)
			}
			y, err := rendered.AsYaml()
			if err != nil {
				t.Fatal(err)
			}
			manifests := string(y)
			if out, err := validate(t, manifests); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for right, wrong := range map[string]string{
				"runAsNonRoot: true":     "runAsNonRoott: true",
				"maxUnavailable: 0":      "maxUnavailible: 0",
				"minReadySeconds: 5":     "minReadySeconds: five",
				"minReplicaCount: 2":     "minReplicaCounts: 2",
				"threshold: \"1\"":       "threshold: 1",
				"podMetricsEndpoints:":   "podMetricsEndpoint:",
				"kind: PodMonitor":       "kind: PodMonitors",
				"apiVersion: batch/v1\n": "apiVersion: batch/v2\n",
			} {
				if (overlay == "dev" || overlay == console) && !strings.Contains(manifests, right) {
					continue // these have no custom resources, and the console little else
				}
				planted := strings.Replace(manifests, right, wrong, 1)
				if planted == manifests {
					t.Fatalf("no %s to break", right)
				}
				if out, err := validate(t, planted); err == nil {
					t.Errorf("%s is accepted:\n%s", wrong, out)
				}
			}
		})
	}
}
