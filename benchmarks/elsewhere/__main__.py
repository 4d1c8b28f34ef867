from benchmarks.elsewhere.bench import main

main()
