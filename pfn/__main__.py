from pfn.cli import main

main()
