# bash completion for unitmeter
# Written by packaging/generate; "go generate ./packaging/..." renews it.
_unitmeter() {
	local current=${COMP_WORDS[COMP_CWORD]} words units name
	COMPREPLY=()
	case $COMP_CWORD,${COMP_WORDS[1]} in
	1,*) words='run once top units enable disable meter doctor history version help' ;;
	2,help) words='run once top units enable disable meter doctor history version help environment' ;;
	*,once) words='--interval --json --source' units=1 ;;
	*,top) words='--bytes --interval --once --source' units=1 ;;
	*,units) words='--json' units=1 ;;
	*,enable) words='--all --default --dry-run --ebpf --follow --lost --rearm --runtime' units=1 ;;
	*,disable) words='--all --default --dry-run --ebpf --rearm --reset --runtime' units=1 ;;
	*,doctor) words='--here --json' units= ;;
	*,history) words='--all --bits --bytes --csv --daily --hourly --json --minutely --monthly -n --quarantined --retry --since --until --weekly' units=1 ;;
	esac
	for name in $words; do
		[[ $name == "$current"* ]] && COMPREPLY+=("$name")
	done
	[[ $units ]] || return 0
	# Names of units may have backslashes, so compgen -W is not for them.
	while read -r name _; do
		[[ $name == "$current"* ]] && COMPREPLY+=("$(printf %q "$name")")
	done < <(systemctl list-units --all --plain --no-legend --no-pager --type=service,scope,socket,mount,swap,slice 2>/dev/null)
	return 0
}
complete -F _unitmeter unitmeter
