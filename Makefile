# The same targets serve contributors and .ci/run. Everything but redis-server
# comes through Go.

MODULES     := streams services/ingest services/prefetcher services/persister deployments/local deployments/k8s deployments/monitoring
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
BENCH       ?= .

.PHONY: run test check check-ops build images sbom bench fuzz faults redis-server

# The whole pipeline in one process.
run:
	go run ./deployments/local

# Everything, with the race detector, against real servers.
test: redis-server
	go test -race -shuffle=on work

# What a reviewer should not have to look for. With GOWORK=off a module sees
# only what its go.mod requires, so this is also what keeps imports running one
# way: deployments/local -> services -> streams.
check:
	@test -z "$$(gofmt -l .)" || { echo "not gofmt-clean:"; gofmt -l .; exit 1; }
	go vet work
	go fix -diff work
	go run $(STATICCHECK) $(MODULES:%=./%/...)
	@set -e; for m in $(MODULES); do \
		echo "$$m alone"; \
		GOWORK=off go -C $$m mod tidy -diff; \
		GOWORK=off go -C $$m vet ./...; \
	done

# ingest, prefetcher, persister, streamctl and local, in bin/.
build:
	GOFLAGS= go build -trimpath -buildvcs=auto -o bin/ work

# One image for each program, from scratch. The same commit gives the same bytes.
IMAGES := ingest prefetcher persister streamctl
BUILDER ?= $(shell command -v buildah docker | head -1)
REVISION := $(shell git rev-parse HEAD 2>/dev/null)

images:
	@test -n "$(BUILDER)" || { echo "images need buildah or docker" >&2; exit 1; }
	rm -rf bin/image && mkdir -p bin/image
	GOFLAGS= CGO_ENABLED=0 go build -trimpath -buildvcs=auto -ldflags='-s -w -buildid=' -o bin/image/ ./services/ingest/cmd/ingest ./services/prefetcher/cmd/prefetcher ./services/persister/cmd/persister ./streams/cmd/streamctl
	cp /etc/ssl/certs/ca-certificates.crt bin/image/
	@set -e; for i in $(IMAGES); do \
		set -- --build-arg SERVICE=$$i --build-arg REVISION=$(REVISION) --tag fingerprint-prefetch/$$i .; \
		case "$(BUILDER)" in \
		*buildah) $(BUILDER) --storage-driver=vfs build --isolation=chroot --timestamp 0 "$$@";; \
		*) SOURCE_DATE_EPOCH=0 $(BUILDER) build "$$@";; \
		esac; \
	done

# What each image is made of, as CycloneDX: bin/sbom/NAME.cdx.json.
sbom: bin/tools/cyclonedx-gomod
	mkdir -p bin/sbom
	@set -e; for i in $(IMAGES); do \
		test -x bin/image/$$i || { echo "make images first" >&2; exit 1; }; \
		bin/tools/cyclonedx-gomod bin -json -noserial -output bin/sbom/$$i.cdx.json bin/image/$$i; \
	done

bin/tools/cyclonedx-gomod:
	GOBIN=$(CURDIR)/bin/tools GOFLAGS= go install github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.9.0

# The fault suite in its short form, about two minutes: see docs/reliability.md.
SEED ?= 1
faults: redis-server
	go run ./deployments/local faults --seed $(SEED) --duration 40s --steady 0 --rate 60

bench: redis-server
	go test -run='^$$' -bench='$(BENCH)' -benchmem work

# Half a minute for each parser of strangers' bytes. Inputs are minimised a
# few times only: where timing changes coverage it would never end.
fuzz:
	@set -e; for p in $$(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.Dir}}{{end}}' work); do \
		for f in $$(grep -ho '^func Fuzz[A-Za-z0-9]*' $$p/*_test.go 2>/dev/null | cut -c6-); do \
			echo "$$f in $$p"; go test -run='^$$' -fuzz="^$$f$$" -fuzztime=30s -fuzzminimizetime=10x $$p; \
		done; \
	done

# Tests start a redis-server of their own and run the reader of the scorers'
# page in python3; these two Go cannot bring.
redis-server:
	@command -v redis-server >/dev/null && command -v python3 >/dev/null || { \
		if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server python3; \
		else \
			echo "The tests need redis-server 7 or later and python3, which cannot be installed from here: install them (Debian: sudo apt-get install redis-server python3; macOS: brew install redis python) and try again." >&2; exit 1; \
		fi; }

# What needs programs beside Go: promtool, prometheus and kubectl-validate, built
# here from the Go module proxy into bin/, which takes some minutes once; buildah
# and root for the images, and chromium for the local stack's page.
TOOLS := deployments/monitoring/tools
PROM_TAGS := netgo,remove_all_sd,enable_kubernetes_sd,enable_dns_sd

bin/tools/promtool bin/tools/prometheus &: $(TOOLS)/go.mod
	GOWORK=off GOFLAGS= nice go -C $(TOOLS) build -tags $(PROM_TAGS) -o $(CURDIR)/bin/tools/ tool
	@touch bin/tools/promtool bin/tools/prometheus

.PHONY: check-monitoring check-page check-schemas check-images
check-ops: check-schemas check-images check-page check-monitoring

check-monitoring: redis-server bin/tools/promtool bin/tools/prometheus
	PROMTOOL=$(CURDIR)/bin/tools/promtool PROMETHEUS=$(CURDIR)/bin/tools/prometheus \
		go test -tags checkops -timeout 30m ./deployments/monitoring

# The page of --monitor in headless Chromium.
check-page:
	@command -v chromium >/dev/null || { echo "the check of the page needs chromium (Debian: sudo apt-get install chromium)" >&2; exit 1; }
	go test -tags checkops -run TestMonitorPage ./deployments/local

check-schemas: bin/tools/kubectl-validate
	KUBECTL_VALIDATE=$(CURDIR)/$< go test -tags checkops -timeout 20m -run Schemas ./deployments/k8s

bin/tools/kubectl-validate:
	GOBIN=$(CURDIR)/bin/tools GOFLAGS= go install sigs.k8s.io/kubectl-validate@v0.0.4

check-images:
	deployments/k8s/check-images.sh
