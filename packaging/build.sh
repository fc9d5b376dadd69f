#!/usr/bin/env bash
# Builds the packages and the archive.
#
# usage: packaging/build.sh VERSION ARCH OUTDIR [FORMAT...]
#   VERSION  as in 1.2.3 or 1.2.3-rc.1, with or without a "v" in front
#   ARCH     as Go names it: amd64, arm64, arm, 386, riscv64, ppc64le, s390x
#   FORMAT   deb, rpm, apk, tar.gz; none is all of them
#
# The same source and Go version give the same bytes, wherever and whenever they
# are built. The time of all files is SOURCE_DATE_EPOCH, by default that of the
# last commit.
set -euo pipefail
NFPM=v2.43.0

die() { printf 'build packages: %s\n' "$*" >&2; exit 1; }

[ $# -ge 3 ] || die "three arguments are needed: VERSION ARCH OUTDIR; see $0"
version=${1#v} arch=$2
mkdir -p "$3"
out=$(cd "$3" && pwd)
shift 3
[ $# -gt 0 ] || set -- deb rpm apk tar.gz
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.-]+)?$ ]] ||
  die "VERSION $version is not like 1.2.3 or 1.2.3-rc.1; a package manager could not compare it"
case " amd64 arm64 arm 386 riscv64 ppc64le s390x " in
*" $arch "*) ;;
*) die "ARCH $arch is not known; use the name that 'go env GOARCH' has for it" ;;
esac
for format; do
  case $format in deb | rpm | apk | tar.gz) ;; *) die "FORMAT $format is not known; use deb, rpm, apk or tar.gz" ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct 2>/dev/null || true)}"
[[ $SOURCE_DATE_EPOCH =~ ^[0-9]+$ ]] || die "SOURCE_DATE_EPOCH is not a number of seconds, and there is no commit to take the time from; set it, for instance to $(date +%s)"
export SOURCE_DATE_EPOCH VERSION=$version ARCH=$arch LC_ALL=C TZ=UTC
umask 022
[ "$arch" != arm ] || ARCH=arm7 # nfpm has the variant in the name

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
# -n: no name and no time in the header.
pack() { gzip -9nc >"$stage/$1"; }

GOOS=linux GOARCH=$arch GOARM=7 GOFLAGS=-mod=readonly make -s build BINARY="$stage/unitmeter"

cp -r packaging/{unitmeter.service,unitmeter-meter.service,unitmeter-rearm.service,unitmeter.sysusers,unitmeter.env,completion,examples,scripts,copyright,nfpm.yaml} "$stage/"
pack unitmeter.8.gz <packaging/unitmeter.8
pack changelog.gz <<END
unitmeter ($version) stable; urgency=medium

  * See https://github.com/unitmeter/unitmeter/blob/main/CHANGELOG.md

 -- unitmeter developers <unitmeter@users.noreply.github.com>  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
END

# Our licence, and those of what is linked in, ask to be passed on with it.
licences() {
  printf 'unitmeter\n=========\n\n'
  cat LICENSE
  printf '\n\nGo\n==\n\n'
  cat "$(go env GOROOT)/LICENSE"
  GOOS=linux GOARCH=$arch CGO_ENABLED=0 go list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}}@{{.Version}} {{.Dir}}{{end}}{{end}}' ./cmd/unitmeter |
    sort -u | while read -r module dir; do
    printf '\n\n%s\n%s\n' "$module" "${module//?/=}"
    files=$(find "$dir" -maxdepth 1 \( -iname 'LICENSE*' -o -iname 'LICENCE*' -o -iname 'COPYING*' -o -iname 'NOTICE*' \) | sort)
    [ -n "$files" ] || die "find the licence of $module: none in $dir"
    for file in $files; do printf '\n'; cat "$file"; done
  done
}
licences >"$stage/LICENSES"
pack LICENSES.gz <"$stage/LICENSES"

# nfpm takes the times of the scripts from their files.
find "$stage" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

for format; do
  case $format in
  tar.gz)
    name=unitmeter-$version-linux-$arch
    mkdir -p "$stage/tar/$name"
    cp -r "$stage"/{unitmeter,unitmeter.service,unitmeter-meter.service,unitmeter-rearm.service,unitmeter.sysusers,unitmeter.env,completion,examples,LICENSES} "$stage/tar/$name/"
    cp packaging/unitmeter.8 "$stage/tar/$name/"
    tar -C "$stage/tar" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" \
      --mode=u=rwX,go=rX --format=ustar -cf - "$name" | gzip -9n >"$out/$name.tar.gz"
    printf 'created package: %s\n' "$out/$name.tar.gz"
    ;;
  *)
    (cd "$stage" && GOFLAGS= GOWORK=off go run "github.com/goreleaser/nfpm/v2/cmd/nfpm@$NFPM" package --config nfpm.yaml --packager "$format" --target "$out/")
    ;;
  esac
done
