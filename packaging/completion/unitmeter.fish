# fish completion for unitmeter
# Written by packaging/generate; "go generate ./packaging/..." renews it.
complete -c unitmeter -f
complete -c unitmeter -n __fish_use_subcommand -a run -d 'meter all units and send the metrics until stopped (the default)'
complete -c unitmeter -n __fish_use_subcommand -a once -d 'read all units once and print what they received and sent'
complete -c unitmeter -n __fish_use_subcommand -a version -d 'print the version'
complete -c unitmeter -n __fish_use_subcommand -a help -d 'print this help, or the variables that configure unitmeter'
complete -c unitmeter -n '__fish_seen_subcommand_from help' -a 'run once version help environment'
complete -c unitmeter -n '__fish_seen_subcommand_from once' -l interval -x -d 'read twice, this far apart, and print the speeds between'
complete -c unitmeter -n '__fish_seen_subcommand_from once' -l json -d 'print a JSON array with one object for each unit'
complete -c unitmeter -n '__fish_seen_subcommand_from once' -a '(systemctl list-units --all --plain --no-legend --no-pager --type=service,scope,socket,mount,swap,slice 2>/dev/null | string match -r "^\S+")'
