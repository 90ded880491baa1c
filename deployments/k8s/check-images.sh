#!/bin/sh
# Builds the images twice, which must give the same digests, and runs each the
# way the manifests do: as uid 65532, without capabilities or a way to new
# privileges, on a read-only root. Needs root and buildah; there is no container
# runtime here, so the kernel is asked directly.
set -eu
cd "$(dirname "$0")/../.."
build() { make images >/dev/null 2>&1 || { echo "make images failed" >&2; exit 1; }; }
digests() {
	for i in ingest prefetcher persister streamctl; do
		echo "$i $(buildah --storage-driver=vfs inspect --type image --format '{{.FromImageDigest}}' "localhost/fingerprint-prefetch/$i")"
	done
}
build
first=$(digests)
build
second=$(digests)
echo "$first"
case $first in *sha256:*) ;; *) echo "no digests" >&2; exit 1 ;; esac
[ "$first" = "$second" ] || { echo "another build gives other digests:" >&2; echo "$second" >&2; exit 1; }

c='' pid=''
clean() {
	[ -z "$pid" ] || kill "$pid" 2>/dev/null || true
	[ -z "$c" ] || buildah --storage-driver=vfs rm "$c" >/dev/null
	c='' pid=''
}
trap clean EXIT
run='mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && root=$1 && shift && exec setpriv --no-new-privs chroot --userspec=65532:65532 --groups= "$root" /service "$@"'
for i in ingest prefetcher persister streamctl; do
	c=$(buildah --storage-driver=vfs from --pull-never "localhost/fingerprint-prefetch/$i")
	root=$(buildah --storage-driver=vfs mount "$c")
	unshare -m sh -c "$run" sh "$root" --version
	case $i in
	ingest) clean; continue ;; # does not start without keys
	streamctl) set -- exporter ;;
	*) set -- ;;
	esac
	OPS_ADDR=127.0.0.1:29104 LOG_LEVEL=error unshare -m sh -c "$run" sh "$root" "$@" &
	pid=$!
	n=0
	until curl -fsS -o /dev/null http://127.0.0.1:29104/livez 2>/dev/null; do
		n=$((n + 1))
		[ $n -lt 300 ] || { echo "$i does not answer" >&2; exit 1; }
		sleep 0.1
	done
	for want in 'Uid:	65532	65532	65532	65532' 'CapEff:	0000000000000000' 'CapPrm:	0000000000000000' 'NoNewPrivs:	1'; do
		grep -qxF "$want" "/proc/$pid/status" || { echo "$i runs without $want" >&2; exit 1; }
	done
	awk '$5 == "/" || $5 == "'"$root"'" { opts = $6 } END { exit opts !~ /^ro/ }' "/proc/$pid/mountinfo" || { echo "$i can write to its root" >&2; exit 1; }
	kill "$pid"
	wait "$pid" || { echo "$i does not stop cleanly" >&2; exit 1; }
	pid=''
	clean
done
echo "all images run read-only as 65532 without capabilities"
